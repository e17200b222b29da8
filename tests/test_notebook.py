"""The notebook: stored bare, and run on a real run from the first cell to the last."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tiny_jobs import distill_config

from actors.recipe import PanelRecipe, build_local_panel
from cluster.checkpoints import latest_checkpoint
from cluster.storage import RunStore
from jobs import distill
from jobs.runs import read_config
from jobs.settings import DistillConfig, TrainConfig

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "panel.ipynb"


@dataclass
class Session:
    """The notebook after its last cell, in a kernel that lives on."""

    run: str
    notebook: Any
    client: NotebookClient

    def again(self, run: str) -> None:
        """Run the cells that open a run once more, on another one."""
        cells = [nbformat.v4.new_code_cell(f"os.environ['COUNTERPOINT_RUN'] = {run!r}")]
        cells += [cell for cell in self.notebook.cells if "RunStore(os.environ" in cell.source]
        assert len(cells) == 2
        for cell in cells:
            self.notebook.cells.append(cell)
            self.client.execute_cell(cell, len(self.notebook.cells) - 1)


@pytest.fixture(scope="module")
def session(tiny_run: str) -> Iterator[Session]:
    """Every cell run on a student that met a panel, in the directory where the notebook lies."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources=place)
    with client.setup_kernel(env=os.environ | {"COUNTERPOINT_RUN": tiny_run}):
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        yield Session(tiny_run, notebook, client)


def outputs(notebook: Any, kind: str) -> list[str]:
    """What the cells have shown as `kind`, a MIME type."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None


def test_the_notebook_shows_what_a_panel_learned(session: Session) -> None:
    assert len(outputs(session.notebook, "image/png")) >= 9
    tables = "\n".join(outputs(session.notebook, "text/markdown"))
    for timestep, updates in levels_of(session.run):
        assert re.search(rf"\| t = {timestep} \| \d+ \| \d+ \| {updates:.1f} \|", tables)
    assert "agree least" in tables


def levels_of(run: str) -> list[tuple[int, float]]:
    """The timestep and the mean number of updates of each critic group, straight from the checkpoint."""
    checkpoint = latest_checkpoint(RunStore(run))
    assert checkpoint is not None
    config = read_config(RunStore(run), DistillConfig)
    noise = read_config(RunStore(config.teacher), TrainConfig).noise
    recipe = PanelRecipe(config.teacher, config.critics.plain(), noise, config.seed)
    panel = build_local_panel(recipe, torch.device("cpu"))
    found = []
    for index, timestep in enumerate(panel.pool.timesteps):
        state = checkpoint.tensors(f"critics-{index}")
        updates = [u for name, tensor in state.items() if name.endswith(".updates") for u in tensor.tolist()]
        found.append((timestep, sum(updates) / len(updates)))
    return found


def test_a_run_without_a_panel_is_refused_in_words(
    session: Session, tiny_teacher: str, tmp_path: Path
) -> None:
    alone = {"steps": 2, "batch_size": 16, "adversarial_weight": 0.0}
    distill.main(distill_config(tmp_path / "run", tiny_teacher, adversarial=alone))
    with pytest.raises(CellExecutionError, match="has no panel in its checkpoint"):
        session.again(str(tmp_path / "run"))

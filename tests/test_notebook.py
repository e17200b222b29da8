"""The notebooks: small as stored, and run on a real run from the first cell to the last."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from tiny_jobs import distill_config

from actors.recipe import PanelRecipe, build_local_panel
from actors.sampler import LocalSampler, load_policy
from cluster.checkpoints import latest_checkpoint
from cluster.storage import RunStore
from counterpoint.environments.config import EnvironmentConfig, build_environment
from counterpoint.environments.episode import Episode
from counterpoint.environments.running import Runner
from counterpoint.policies.observation import Observation
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Decision, Stream
from counterpoint.selection.decoding import predraw
from counterpoint.selection.naive import sample_candidates_naively
from jobs import distill
from jobs.runs import read_config
from jobs.settings import DistillConfig, TrainConfig

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PANEL, ACTIONS = NOTEBOOKS / "panel.ipynb", NOTEBOOKS / "action_selection.ipynb"
SEED = 2_000_000
MOST_BYTES = 400_000


@dataclass
class Session:
    """A notebook after its last cell, in a kernel that lives on."""

    variable: str
    """The environment variable that names the run."""
    run: str
    notebook: Any
    client: NotebookClient

    def again(self, run: str) -> None:
        """Run the cells that open a run once more, on another one."""
        cells = [nbformat.v4.new_code_cell(f"os.environ[{self.variable!r}] = {run!r}")]
        cells += [cell for cell in self.notebook.cells if "RunStore(os.environ" in cell.source]
        assert len(cells) == 2
        for cell in cells:
            self.notebook.cells.append(cell)
            self.client.execute_cell(cell, len(self.notebook.cells) - 1)


@contextmanager
def executed(path: Path, variable: str, run: str) -> Iterator[Session]:
    """Every cell of a notebook run on `run`, in the directory where the notebook lies."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=500, kernel_name="python3", resources=place)
    with client.setup_kernel(env=os.environ | {variable: run}):
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        yield Session(variable, run, notebook, client)


@pytest.fixture(scope="module")
def session(tiny_run: str) -> Iterator[Session]:
    """The panel's notebook on a student that met a panel."""
    with executed(PANEL, "COUNTERPOINT_RUN", tiny_run) as session:
        yield session


@pytest.fixture(scope="module")
def acting(tiny_policy: str) -> Iterator[Session]:
    """The notebook of one episode on a policy that has learned next to nothing."""
    with executed(ACTIONS, "COUNTERPOINT_POLICY", tiny_policy) as session:
        yield session


def outputs(notebook: Any, kind: str) -> list[str]:
    """What the cells have shown as `kind`, a MIME type."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


@pytest.mark.parametrize("path", [PANEL, ACTIONS], ids=lambda path: path.stem)
def test_a_notebook_is_stored_bare_or_as_one_run_left_it(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    counts = [cell.execution_count for cell in code]
    assert counts in ([None] * len(code), [*range(1, len(code) + 1)])
    shown = [output for cell in code for output in cell.outputs]
    assert bool(shown) == (counts[0] is not None)
    assert {output.output_type for output in shown} <= {"display_data"}
    text = path.read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES
    assert not re.search(r'["\s(`](/|~/|[A-Z]:\\)\w+/', text), "it names a path of one machine"


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


def test_the_notebook_shows_why_an_action_is_chosen(acting: Session) -> None:
    assert len(outputs(acting.notebook, "image/png")) >= 7
    assert not [o for cell in acting.notebook.cells for o in cell.get("outputs", []) if "text" in o]
    said = "\n".join(outputs(acting.notebook, "text/markdown"))
    episode, observations = played(acting.run)
    assert f"{episode.instruction}: **{episode.outcome}** after {episode.steps} steps" in said
    assert f"{episode.decisions} decisions; {episode.rejected} candidates" in said
    beginnings = [len({tokens[:4] for tokens in decision.tokens}) for decision in episode.trace]
    k = int(np.argmax(beginnings))
    row = [f"**{n}**" if i == k else str(n) for i, n in enumerate(beginnings)]
    assert f"| different beginnings | {' | '.join(row)} |" in said
    for rule, expected in confidences_of(acting.run, observations[k], k).items():
        (line,) = re.findall(rf"\| {rule} \| (.*\d.*) \| (\d) \|", said)
        values = [float(value.strip("* ")) for value in line[0].split("|")]
        np.testing.assert_allclose(values, expected, atol=2e-3)
        assert int(line[1]) == np.argmax(expected) + 1
        assert line[0].split(" | ")[np.argmax(expected)].startswith("**")
        ((same, difference),) = re.findall(rf"\| {rule} \| (the same|different) \| ([\d.e+-]+) \|", said)
        assert same == "the same"
        assert float(difference) < 1e-4
    (difference,) = re.findall(r"differ from those that decided by at most ([\d.e+-]+)\.", said)
    assert float(difference) < 1e-4


def played(run: str) -> tuple[Episode, list[Observation]]:
    """The episode as a rollout plays it, and what its policy was shown."""
    text = SelectionConfig(rule="masked_condition", mask="text")
    sampler, observations = LocalSampler(run), list[Observation]()

    def choose(seen: list[Observation], streams: list[Stream]) -> list[Decision]:
        observations.extend(seen)
        return sampler.act(seen, streams, text)

    runner = Runner(lambda: build_environment(EnvironmentConfig()))
    (episode,) = runner.run([SEED], choose, traced=[SEED])
    runner.close()
    assert isinstance(episode, Episode)
    return episode, observations


def confidences_of(run: str, observation: Observation, k: int) -> dict[str, np.ndarray]:
    """Each rule's confidences of a decision's candidates, from logits without any cache, by scipy."""
    bundle = load_policy(run)
    policy, inputs = bundle.policy, bundle.prepare([observation])
    uniforms = predraw([Stream(SEED, k)], 0, 4, policy.max_tokens)
    tokens = sample_candidates_naively(policy, inputs, uniforms, SelectionConfig(rule="random")).tokens[0]
    told = {name: tensor.repeat_interleave(4, 0) for name, tensor in policy.encode(inputs).items()}
    with torch.no_grad():
        full, *masked = (
            policy.logits(told, mask, tokens).double().numpy() for mask in ("none", "text", "state", "both")
        )
    first = softmax(full[:, :5], -1)
    found = {
        f"mask {mask}": entropy(softmax(logits[:, :5] / 4, -1), first, axis=-1).sum(-1)
        for mask, logits in zip(("text", "state", "both"), masked, strict=True)
    }
    found["self-certainty"] = entropy(np.full_like(first, 1 / first.shape[-1]), first, axis=-1).sum(-1)
    drawn = np.take_along_axis(log_softmax(full, -1), tokens.numpy()[..., None], -1)
    return found | {"likelihood": drawn.sum((1, 2))}


def test_a_run_without_a_policy_is_refused_in_words(acting: Session, tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match=r"has no policy: make one with `python -m jobs\.train"):
        acting.again(str(tmp_path))

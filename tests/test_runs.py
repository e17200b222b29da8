"""A run is resumed by a later version: keys that came since have their defaults, all others must be equal."""

import pytest
import yaml
from tiny_jobs import distill_config
from tiny_policies import policy_config

from cluster.storage import RunStore
from jobs.runs import CONFIG, open_run, read_config
from jobs.settings import DistillConfig


def stored_without(store, *keys):
    """Take dotted keys out of a run's stored configuration, as if they had not existed when it was made."""
    data = yaml.safe_load(store.read_text(CONFIG))
    for key in keys:
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        del node[last]
    store.write_text(CONFIG, yaml.safe_dump(data))


def resume(config, **changes):
    """Open the run again, with sections changed."""
    changed = config.model_validate(config.model_dump(exclude_unset=True) | changes)
    return open_run(config.run, changed, resume=True, in_process=True)


@pytest.fixture
def config(tmp_path):
    """Of a run that has been made."""
    made = distill_config(tmp_path / "run", str(tmp_path / "teacher"))
    open_run(made.run, made, resume=False, in_process=True)
    return made


def test_keys_and_sections_that_came_later_have_their_defaults(config):
    store = RunStore(config.run)
    stored_without(store, "adversarial.staleness", "critics.wire_dtype", "critics.replicas", "real_limit")
    # A section's defaults are those that its parent gives it, here another rate than the optimizer's own.
    stored_without(store, "adversarial.optimizer.learning_rate", "warmup.optimizer", "alarms")
    assert read_config(store, DistillConfig) == config
    resume(config)
    assert read_config(store, DistillConfig) == config


def test_a_new_key_that_is_set_is_refused(config):
    stored_without(RunStore(config.run), "adversarial.staleness")
    adversarial = config.adversarial.model_dump(exclude_unset=True) | {"staleness": 1}
    with pytest.raises(ValueError, match=r"adversarial.staleness=1 but the run at .* was made with 0:"):
        resume(config, adversarial=adversarial)


@pytest.mark.parametrize(("key", "value"), [("critics.gone", 3), ("critics.width", -4)])
def test_what_is_refused_today_is_named(config, key, value):
    """A key that has been removed, or a value that was legal once."""
    store = RunStore(config.run)
    data = yaml.safe_load(store.read_text(CONFIG))
    data["critics"][key.split(".")[1]] = value
    store.write_text(CONFIG, yaml.safe_dump(data))
    with pytest.raises(ValueError, match=rf"{key}=.* but the run at .* was made with {value}:") as caught:
        resume(config)
    assert "\n" not in str(caught.value)


def test_a_policys_run_is_resumed_too(tmp_path):
    made = policy_config(tmp_path / "run", tmp_path / "demos")
    store = open_run(made.run, made, resume=False, in_process=True)
    stored_without(store, "trainer", "seed")
    open_run(made.run, made, resume=True, in_process=True)

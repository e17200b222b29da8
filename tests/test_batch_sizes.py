"""Batches that cannot be shared out are refused with the arithmetic and the nearest that can."""

import pytest
from tiny_jobs import distill_config, train_config

from actors.training import TrainerConfig
from jobs.batch_sizes import check_batch_sizes
from jobs.train_policy import PolicyTrainConfig


@pytest.mark.parametrize("size", range(1, 40))
@pytest.mark.parametrize(
    ("workers", "accumulate", "levels"), [(0, 1, 4), (1, 1, 4), (2, 1, 1), (2, 3, 2), (3, 1, 4)]
)
def test_a_batch_is_refused_exactly_if_some_part_would_be_larger_than_another(
    size, workers, accumulate, levels
):
    trainer = TrainerConfig(workers=workers, accumulate=accumulate)
    parts = max(1, workers) * accumulate
    even = parts == 1 or (size % parts == 0 and (size // parts) % levels == 0)
    if even:
        check_batch_sizes({"batch": size}, trainer, levels)
        return
    with pytest.raises(ValueError, match=f"batch={size} ") as caught:
        check_batch_sizes({"batch": size}, trainer, levels)
    told = str(caught.value).rpartition("use ")[2]
    for offered in map(int, told.split(" or ")):
        check_batch_sizes({"batch": offered}, trainer, levels)
        assert abs(offered - size) < parts * levels


def test_every_training_job_checks_its_batches(tmp_path):
    three = {"workers": 3}
    with pytest.raises(ValueError, match=r"teacher\.batch_size=16 .* use 15 or 18"):
        train_config(tmp_path, teacher={"steps": 1, "batch_size": 16}, trainer=three)
    with pytest.raises(ValueError, match=r"warmup\.batch_size=16"):
        distill_config(tmp_path, "teacher", warmup={"batch_size": 16}, critics={"actors": 1}, trainer=three)
    with pytest.raises(ValueError, match=r"adversarial\.batch_size=16 .*levels_per_step.* use 12 or 18"):
        distill_config(
            tmp_path, "teacher", warmup={"batch_size": 18}, adversarial={"batch_size": 16},
            critics={"actors": 1, "levels_per_step": 2}, trainer=three,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"training\.batch_size=64 .* use 63 or 66"):
        PolicyTrainConfig(trainer=TrainerConfig(workers=3))
    with pytest.raises(ValueError, match=r"training\.perception\.batch_size"):
        PolicyTrainConfig.model_validate(
            {"training": {"batch_size": 66, "perception": {"batch_size": 50}}, "trainer": three}
        )

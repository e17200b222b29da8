"""Requests share evaluations; their images are those they have alone, and one's fault or leave is its own."""

import gc
import random
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait
from concurrent.futures import TimeoutError as Late
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from tiny import CLASSES, unet

from actors.serving.config import BatchingConfig
from actors.serving.engine import Engine
from actors.serving.image_model import ImageModel, build_image_model, canary
from actors.serving.messages import ImageRequest
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.seeds import generator
from counterpoint.unet import frozen

LONG = 30.0
"""Seconds that no test waits."""
ROOM = 16


@cache
def network(seed=0):
    return frozen(unet(seed=seed))


class Watched(torch.nn.Module):
    """A network that writes down the labels of each evaluation, waits at its gate, and has a fault or two."""

    def __init__(self, inner=None, name="", log=None, gated=False, refused=-1, spoilt=-1):
        super().__init__()
        self.inner = inner or network()
        self.config, self.name, self.gated = self.inner.config, name, gated
        self.log = [] if log is None else log
        self.refused, self.spoilt = refused, spoilt
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def forward(self, x, t, class_labels):
        self.log.append((self.name, len(x)))
        self.entered.release()
        if self.gated:
            assert self.gate.acquire(timeout=LONG)
        if self.refused in class_labels:
            raise RuntimeError(f"label {self.refused} is more than this network can bear")
        output = self.inner(x, t, class_labels=class_labels)
        output.sample[class_labels == self.spoilt] = torch.nan
        return output

    def wait(self):
        """Return once the engine stands at the gate."""
        assert self.entered.acquire(timeout=LONG)

    def let(self, evaluations):
        """Let so many through the gate."""
        self.gate.release(evaluations)


def model(watched=None, sizes=(1, 2, 3, 4, 8, 16), scheduler=None, max_steps=4):
    return ImageModel(
        watched or network(), scheduler or TimestepShiftScheduler(), "v1", sizes, max_steps, CLASSES
    )


def ask(label=3, **options):
    return ImageRequest("digits", label, **options)


@pytest.fixture
def engine():
    engine = Engine(BatchingConfig(max_batch=ROOM, max_wait=0.0))
    yield engine
    engine.close()


@cache
def pictures(request, seed=0, scheduler=TimestepShiftScheduler):
    """What the pipeline makes of a request, in batches of 16 rows as the engine's are, as uint8 [n,H,W,C]."""
    images = []
    pipeline = ClassConditionalPipeline(network(seed), scheduler())
    pipeline.set_progress_bar_config(disable=True)
    rows = ROOM if request.guidance_scale == 1.0 else ROOM // 2
    for index in range(request.count):
        streams = [generator(request.seed, "sample", request.label, index) for _ in range(rows)]
        labels = [request.label] * rows
        made = pipeline(labels, request.steps, request.guidance_scale, streams, output_type="pt").images
        images.append(made[0].permute(1, 2, 0).add(1.0).mul(127.5).round().to(torch.uint8).numpy())
    return np.stack(images)


def requests(count, seed, counts=(1, 2, 3)):
    """Requests of all kinds."""
    stream = random.Random(seed)
    return [
        ask(
            stream.randrange(CLASSES),
            count=stream.choice(counts),
            steps=stream.randint(1, 4),
            guidance_scale=stream.choice([1.0, 1.0, 3.0]),
            seed=stream.randrange(100),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def exact():
    return build_image_model(unet(), TimestepShiftScheduler(), "v1", ROOM, True, "cpu")


def test_a_request_alone_has_the_pipelines_images(engine, exact):
    request = ask(4, count=3, steps=2, seed=11)
    answer = engine.submit(exact, request, LONG).result(LONG)
    assert (answer.images.shape, answer.images.dtype) == ((3, 8, 8, 1), np.uint8)
    assert np.array_equal(answer.images, pictures(request))
    assert (answer.evaluations, answer.batch_size) == (2, 3.0)
    assert answer.queued_s >= 0
    assert answer.compute_s > 0


@pytest.mark.parametrize("seed", range(3))
def test_images_are_the_same_in_any_crowd(engine, exact, seed):
    asked, stream = requests(12, seed), random.Random(seed)
    futures = [None] * len(asked)

    def submit(indices):
        for index in indices:
            futures[index] = engine.submit(exact, asked[index], LONG)
            time.sleep(stream.random() * 0.004)

    callers = [threading.Thread(target=submit, args=(range(start, 12, 3),)) for start in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for request, future in zip(asked, futures, strict=True):
        assert np.array_equal(future.result(LONG).images, pictures(request))
    statistics = engine.statistics()
    steps = sum(request.steps * request.count * (1 + (request.guidance_scale != 1)) for request in asked)
    assert statistics.rows == steps
    assert statistics.evaluations < sum(request.steps * request.count for request in asked)
    assert (statistics.requests, statistics.waiting, statistics.running) == (12, 0, 0)


def test_more_images_than_there_is_room_for_come_in_order(engine, exact):
    request = ask(2, count=ROOM + 5, steps=2, seed=3)
    answer = engine.submit(exact, request, LONG).result(LONG)
    assert np.array_equal(answer.images, pictures(request))
    assert answer.evaluations == 4


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_serve_too(engine, scheduler):
    teacher = build_image_model(unet(), scheduler(), "v1", ROOM, True, "cpu")
    assert teacher.max_steps == 1000
    asked = [ask(1, steps=6, count=2), ask(2, steps=3, guidance_scale=2.0, seed=1)]
    futures = [engine.submit(teacher, request) for request in asked]
    for request, future in zip(asked, futures, strict=True):
        expected = pictures(request, scheduler=scheduler).astype(int)
        assert np.abs(future.result(LONG).images - expected).max() <= 1


def test_a_short_request_joins_a_long_one_and_leaves_before_it(engine):
    watched = Watched(gated=True)
    long = engine.submit(served := model(watched), ask(steps=4))
    watched.wait()
    short = engine.submit(served, ask(steps=1))
    watched.let(2)
    answer = short.result(LONG)
    watched.wait()
    watched.wait()
    assert len(watched.log) == 3
    assert not long.done()
    watched.let(2)
    assert (answer.evaluations, answer.batch_size) == (1, 2.0)
    answer = long.result(LONG)
    assert (answer.evaluations, answer.batch_size) == (4, 1.25)
    assert [rows for _, rows in watched.log] == [1, 2, 1, 1]


def test_nobody_overtakes_one_that_needs_more_room():
    watched = Watched(gated=True)
    engine = Engine(BatchingConfig(max_batch=3, max_wait=0.0))
    served = model(watched)
    futures = [engine.submit(served, ask(steps=2, guidance_scale=2.0))]
    watched.wait()
    futures.append(engine.submit(served, ask(guidance_scale=2.0, seed=1)))
    futures.append(engine.submit(served, ask(seed=2)))
    watched.let(9)
    assert not wait(futures, LONG).not_done
    assert [rows for _, rows in watched.log] == [2, 2, 3]
    engine.close()


def test_guidance_is_served_where_rows_are_evaluated_alone():
    watched = Watched()
    engine = Engine(BatchingConfig(max_batch=1, max_wait=0.0))
    request = ask(guidance_scale=2.0, steps=2)
    answer = engine.submit(model(watched, sizes=(1,)), request).result(LONG)
    assert [rows for _, rows in watched.log] == [1] * 4
    assert np.abs(answer.images - pictures(request).astype(int)).max() <= 1
    engine.close()


def test_an_idle_engine_waits_for_company_until_it_is_full():
    watched = Watched()
    engine = Engine(BatchingConfig(max_batch=3, max_wait=LONG))
    served = model(watched)
    futures = [engine.submit(served, ask(seed=0))]
    assert not watched.entered.acquire(timeout=0.1)
    futures += [engine.submit(served, ask(seed=seed)) for seed in (1, 2)]
    assert not wait(futures, LONG / 2).not_done
    assert [rows for _, rows in watched.log] == [3]
    engine.close()


def test_a_lone_request_waits_no_longer_than_it_may():
    engine = Engine(BatchingConfig(max_batch=ROOM, max_wait=0.01))
    assert engine.submit(model(), ask()).result(LONG).evaluations == 1
    engine.close()


def test_cancelling_frees_the_room(engine):
    watched = Watched(gated=True)
    served = model(watched)
    large = engine.submit(served, ask(count=ROOM, steps=4))
    watched.wait()
    small, gone = engine.submit(served, ask()), engine.submit(served, ask(seed=1))
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting) == (1, 2)
    assert large.cancel()
    assert gone.cancel()
    watched.let(2)
    assert small.result(LONG).batch_size == 1
    assert [rows for _, rows in watched.log] == [ROOM, 1]
    with pytest.raises(CancelledError):
        large.result(0)


def test_late_requests_are_given_up_wherever_they_are(engine, monkeypatch):
    watched = Watched(gated=True)
    served = model(watched)
    running = engine.submit(served, ask(count=ROOM - 1, steps=4), 2 * LONG)
    watched.wait()
    waiting = engine.submit(served, ask(count=2), 2 * LONG)
    patient = engine.submit(served, ask(), 9 * LONG)
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 3 * LONG)
    watched.let(2)
    for late in (running, waiting):
        with pytest.raises(TimeoutError, match="before the request's deadline"):
            late.result(LONG)
    assert patient.result(LONG).batch_size == 1
    assert [rows for _, rows in watched.log] == [16, 1]
    statistics = engine.statistics()
    assert (statistics.rows, statistics.padded_rows) == (ROOM, 1)


def test_models_take_turns_and_share_no_evaluation(engine):
    log = []
    first, second = (Watched(network(seed), f"{seed}", log, gated=seed == 0) for seed in range(2))
    one, two = model(first), model(second)
    asked = [(one, ask(steps=3, seed=1)), (one, ask(steps=3, seed=2)), (two, ask(steps=4, seed=1)),
             (one, ask(steps=1, seed=3)), (two, ask(steps=1, seed=1))]  # fmt: skip
    futures = [engine.submit(*asked[0])]
    first.wait()
    futures += [engine.submit(*each) for each in asked[1:]]
    first.let(9)
    found = [future.result(LONG).images for future in futures]
    assert "".join(name for name, _ in log) == "01010101"
    assert [rows for name, rows in log if name == "0"] == [1, 3, 2, 1]
    assert [rows for name, rows in log if name == "1"] == [2, 1, 1, 1]
    for (_, request), seed, images in zip(asked, (0, 0, 1, 0, 1), found, strict=True):
        assert np.abs(images - pictures(request, seed).astype(int)).max() <= 1


def test_a_request_keeps_its_version_and_an_old_one_goes_when_its_last_request_does(engine):
    watched = Watched(network(0), gated=True)
    old, new = model(watched), model(network(1))
    request = ask(steps=3)
    before = engine.submit(old, request)
    watched.wait()
    after = engine.submit(new, request)
    watched.let(3)
    assert np.abs(before.result(LONG).images - pictures(request).astype(int)).max() <= 1
    assert np.abs(after.result(LONG).images - pictures(request, 1).astype(int)).max() <= 1
    assert not np.array_equal(before.result().images, after.result().images)
    engine.submit(new, request).result(LONG)
    gone = weakref.ref(old)
    del old
    gc.collect()
    assert gone() is None


def test_a_failing_evaluation_fails_only_the_request_at_fault(engine, exact):
    watched = Watched(gated=True, refused=7)
    served = replace(exact, unet=watched)
    begun = engine.submit(served, ask(steps=4))
    watched.wait()
    good = [ask(1, steps=3, count=2), ask(2, guidance_scale=2.0)]
    futures = [engine.submit(served, good[0])]
    bad = engine.submit(served, ask(7, count=2))
    futures.append(engine.submit(served, good[1]))
    watched.let(20)
    with pytest.raises(RuntimeError, match="label 7 is more than"):
        bad.result(LONG)
    for request, future in zip([ask(steps=4), *good], [begun, *futures], strict=True):
        assert np.array_equal(future.result(LONG).images, pictures(request))
    assert engine.alive
    assert np.array_equal(engine.submit(served, good[0]).result(LONG).images, pictures(good[0]))


def test_an_image_that_is_not_finite_fails_alone(engine, exact):
    served = replace(exact, unet=Watched(spoilt=7))
    bad, good = engine.submit(served, ask(7)), engine.submit(served, ask(1))
    with pytest.raises(ArithmeticError, match="not finite"):
        bad.result(LONG)
    assert np.array_equal(good.result(LONG).images, pictures(ask(1)))


def test_steps_that_only_the_scheduler_refuses_fail_alone(engine, exact):
    served = replace(exact, max_steps=9)
    bad, good = engine.submit(served, ask(steps=5)), engine.submit(served, ask(1))
    with pytest.raises(ValueError, match="student takes 1 to 4 steps"):
        bad.result(LONG)
    assert np.array_equal(good.result(LONG).images, pictures(ask(1)))


def test_a_fault_of_the_engines_own_does_not_end_it(engine, exact, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_board", lambda self, orders: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(exact, ask()).result(LONG)
    assert np.array_equal(engine.submit(exact, ask()).result(LONG).images, pictures(ask()))


def test_closing_fails_what_is_not_finished():
    watched = Watched(gated=True)
    engine = Engine(BatchingConfig(max_batch=1, max_wait=0.0))
    served = model(watched)
    futures = [engine.submit(served, ask(steps=2)), engine.submit(served, ask())]
    watched.wait()
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(Late):
        futures[1].result(0.02)
    assert engine.alive
    watched.let(1)
    closing.join(LONG)
    for future in futures:
        with pytest.raises(RuntimeError, match="closed before"):
            future.result(LONG)
    assert not engine.alive
    assert len(watched.log) == 1
    with pytest.raises(RuntimeError, match="engine is closed"):
        engine.submit(served, ask())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": CLASSES}, "label=10 must be a class from 0 to 9"),
        ({"label": -1}, "label=-1 must be"),
        ({"steps": 5}, "steps=5: the model takes 1 to 4"),
        ({"steps": 0}, "steps=0: the model"),
        ({"count": 0}, "count=0: ask for at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
    ],
)
def test_requests_that_do_not_fit_the_model_are_refused(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(model(), ask(**options))
    assert engine.statistics().requests == 0


def test_a_model_knows_the_sizes_at_which_it_is_exact(exact):
    assert exact.sizes[-1] == ROOM
    assert (exact.max_steps, exact.classes, exact.version) == (4, CLASSES, "v1")
    assert not exact.unet.training
    loose = build_image_model(unet(), TimestepShiftScheduler(), "v1", 5, False, "cpu")
    assert loose.sizes == (1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"sizes=\(\): pass at least one"):
        replace(loose, sizes=())


def test_a_canary_dies_of_damaged_weights(exact):
    canary(exact)
    damaged = unet()
    damaged.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        canary(model(frozen(damaged)))
    empty = unet()
    for weights in empty.parameters():
        weights.data.zero_()
    with pytest.raises(ValueError, match="one shade"):
        canary(model(frozen(empty), scheduler=TimestepShiftScheduler(prediction_type="sample")))

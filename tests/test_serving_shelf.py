"""The shelf: what is promoted is loaded beside the old and tried; what is bad changes nothing."""

import gc
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.serving.shelf import Shelf

WAIT = 30.0
"""Seconds that no test waits unless it fails."""


class Model:
    """A model that knows which checkpoint it is."""

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint


class Library:
    """Loads any checkpoint, unless it is in `bad` or `lost`, and counts; waits where `gates` says so."""

    def __init__(self, bad=(), lost=(), unfit=()):
        self.bad, self.lost, self.unfit = set(bad), set(lost), set(unfit)
        self.loads, self.canaries = Counter(), Counter()
        self.gates, self.reached = {}, {}
        self.models = weakref.WeakSet()

    def hold(self, checkpoint):
        """Let a load of `checkpoint` wait until the returned event is set."""
        self.gates[checkpoint], self.reached[checkpoint] = threading.Event(), threading.Event()
        return self.gates[checkpoint]

    def load(self, checkpoint):
        self.loads[checkpoint] += 1
        if checkpoint in self.gates:
            self.reached[checkpoint].set()
            assert self.gates[checkpoint].wait(WAIT)
        if checkpoint in self.bad:
            raise ValueError(f"checkpoint {checkpoint!r} is\ndamaged")
        if checkpoint in self.lost:
            raise OSError("/secret/path cannot be reached")
        model = Model(checkpoint)
        self.models.add(model)
        return model

    def canary(self, model):
        self.canaries[model.checkpoint] += 1
        if model.checkpoint in self.unfit:
            raise ValueError(f"checkpoint {model.checkpoint!r} gives no finite image")

    def shelf(self, unlisted=None):
        return Shelf(self.load, self.canary, unlisted)

    def alive(self):
        gc.collect()
        return sorted(model.checkpoint for model in self.models)


def in_thread(call, *arguments):
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *arguments)
    pool.shutdown(wait=False)
    return future


def test_a_name_is_loaded_when_it_is_opened_and_kept_while_its_slot_is():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a", "other": "b"})
    assert library.loads == {}
    slot = shelf.open("digits")
    assert (slot.name, slot.model.checkpoint, slot.checkpoint) == ("digits", "a", "a")
    assert shelf.open("digits") is slot is shelf.resident("digits")
    assert shelf.resident("other") is None
    assert (library.loads, library.canaries) == ({"a": 1}, {"a": 1})
    assert shelf.describe() == {
        "digits": {"checkpoint": "a", "in_force": "a", "resident": True, "refused": None},
        "other": {"checkpoint": "b", "in_force": None, "resident": False, "refused": None},
    }


def test_giving_a_slot_up_frees_the_model():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    slot = shelf.open("digits")
    assert library.alive() == ["a"]
    del slot
    assert library.alive() == []
    assert shelf.resident("digits") is None
    assert shelf.open("digits").model.checkpoint == "a"
    assert library.loads == {"a": 2}


def test_a_promotion_is_swapped_into_the_slot_and_the_old_version_goes():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    slot = shelf.open("digits")
    serving = slot.model
    shelf.assign({"digits": "b"})
    assert slot.model.checkpoint == "b"
    assert serving.checkpoint == "a"
    assert library.alive() == ["a", "b"]
    del serving
    assert library.alive() == ["b"]
    shelf.assign({"digits": "b"})
    assert library.loads == {"a": 1, "b": 1}


def test_a_promotion_of_what_is_not_in_memory_loads_nothing():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    shelf.assign({"digits": "b"})
    assert library.loads == {}
    assert shelf.open("digits").model.checkpoint == "b"


@pytest.mark.parametrize("fault", ["bad", "unfit", "lost"])
def test_a_bad_promotion_leaves_the_old_version_at_work_and_is_told(fault, caplog):
    library = Library(**{fault: ["b"]})
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    slot = shelf.open("digits")
    before = slot.model
    shelf.assign({"digits": "b"})
    assert slot.model is before
    refused = shelf.refused("digits")
    assert "'b'" in refused
    assert "\n" not in refused
    assert "/secret" not in refused
    assert "'b'" in caplog.text
    assert shelf.describe()["digits"] == {
        "checkpoint": "b", "in_force": "a", "resident": True, "refused": refused,
    }  # fmt: skip
    assert library.alive() == ["a"], "what was refused does not stay in memory"
    getattr(library, fault).clear()
    shelf.assign({"digits": "b"})
    assert (slot.model.checkpoint, shelf.refused("digits")) == ("b", None)


def test_going_back_to_the_version_in_force_forgets_the_refusal_and_loads_nothing():
    library = Library(bad=["b"])
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    slot = shelf.open("digits")
    shelf.assign({"digits": "b"})
    shelf.assign({"digits": "a"})
    assert (slot.checkpoint, shelf.refused("digits")) == ("a", None)
    assert library.loads["a"] == 1


@pytest.mark.parametrize("fault", ["bad", "unfit", "lost"])
def test_opening_falls_back_to_the_latest_good_checkpoint(fault):
    library = Library(**{fault: ["c", "d"]})
    shelf = library.shelf()
    for checkpoint in "abcd":
        shelf.assign({"digits": checkpoint})
    slot = shelf.open("digits")
    assert slot.checkpoint == "b"
    assert "'d'" in shelf.refused("digits")
    assert library.alive() == ["b"]
    getattr(library, fault).clear()
    shelf.assign({"digits": "d"})
    assert (slot.checkpoint, shelf.refused("digits")) == ("d", None)


def test_after_a_refused_promotion_an_eviction_brings_the_good_version_back():
    library = Library(bad=["b"])
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    slot = shelf.open("digits")
    shelf.assign({"digits": "b"})
    del slot
    assert shelf.open("digits").checkpoint == "a"
    assert library.loads == {"a": 2, "b": 2}
    library.bad.add("c")
    shelf.assign({"digits": "c"})
    assert shelf.open("digits").checkpoint == "a"
    assert library.loads == {"a": 3, "b": 2, "c": 1}, "what was refused is nothing to fall back on"


def test_what_was_refused_is_freed_before_its_fallback_is_loaded():
    library = Library(unfit=["b"])
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    shelf.assign({"digits": "b"})
    gate = library.hold("a")
    opening = in_thread(shelf.open, "digits")
    assert library.reached["a"].wait(WAIT)
    assert library.alive() == []
    gate.set()
    assert opening.result(WAIT).checkpoint == "a"


def test_without_a_good_checkpoint_the_latest_ones_fault_is_raised():
    library = Library(bad=["a", "b"])
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    shelf.assign({"digits": "b"})
    with pytest.raises(ValueError, match="'b' is"):
        shelf.open("digits")
    assert "'b' is damaged" in shelf.refused("digits")
    assert shelf.resident("digits") is None
    library.bad.clear()
    assert shelf.open("digits").checkpoint == "b"
    assert shelf.refused("digits") is None


def test_a_store_that_cannot_be_reached_is_not_taken_for_a_bad_checkpoint():
    library = Library(lost=["a"])
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    with pytest.raises(OSError, match="cannot be reached"):
        shelf.open("digits")


def test_names_that_are_no_longer_assigned_are_forgotten():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a", "other": "b"})
    slot = shelf.open("digits")
    shelf.assign({"other": "b"})
    assert shelf.describe().keys() == {"other"}
    assert shelf.resident("digits") is None
    assert shelf.refused("digits") is None
    assert slot.model.checkpoint == "a"
    with pytest.raises(ValueError, match="'digits' is not served: give one of other"):
        shelf.open("digits")


def test_an_unlisted_name_is_opened_as_what_it_stands_for():
    def unlisted(name):
        if name != "runs/x@7":
            raise ValueError(f"there is no {name!r}")
        return name

    library = Library()
    shelf = library.shelf(unlisted)
    shelf.assign({"digits": "a"})
    slot = shelf.open("runs/x@7")
    assert slot.checkpoint == "runs/x@7"
    assert shelf.describe()["runs/x@7"] == {
        "checkpoint": "runs/x@7", "in_force": "runs/x@7", "resident": True, "refused": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="there is no 'runs/y'"):
        shelf.open("runs/y")
    shelf.assign({"digits": "a", "runs/x@7": "b"})
    assert slot.checkpoint == "b"


def test_two_who_open_a_name_at_once_load_it_once():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    gate = library.hold("a")
    callers = [in_thread(shelf.open, "digits") for _ in range(8)]
    assert library.reached["a"].wait(WAIT)
    gate.set()
    slots = {id(caller.result(WAIT)) for caller in callers}
    assert len(slots) == 1
    assert library.loads == {"a": 1}


def test_a_slow_load_blocks_no_reader_and_no_other_name():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a", "other": "x"})
    slot = shelf.open("digits")
    gate = library.hold("b")
    promotion = in_thread(shelf.assign, {"digits": "b", "other": "x"})
    assert library.reached["b"].wait(WAIT)
    assert shelf.open("digits") is slot
    assert slot.model.checkpoint == "a"
    assert shelf.open("other").model.checkpoint == "x"
    assert shelf.describe()["digits"]["checkpoint"] == "b"
    assert not promotion.done()
    gate.set()
    promotion.result(WAIT)
    assert slot.model.checkpoint == "b"


def test_readers_see_the_old_version_or_the_new_one_and_never_go_back():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "000"})
    slot, stop = shelf.open("digits"), threading.Event()

    def read():
        seen = [slot.model.checkpoint]
        while not stop.is_set():
            now = shelf.open("digits").model.checkpoint
            if now != seen[-1]:
                seen.append(now)
        return seen

    readers = [in_thread(read) for _ in range(4)]
    for version in range(1, 100):
        shelf.assign({"digits": f"{version:03}"})
    stop.set()
    for reader in readers:
        seen = reader.result(WAIT)
        assert seen == sorted(set(seen))
    assert slot.model.checkpoint == "099"
    assert library.alive() == ["099"]


def test_a_later_assignment_overtakes_one_that_is_still_loading():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    slot = shelf.open("digits")
    gate = library.hold("b")
    first = in_thread(shelf.assign, {"digits": "b"})
    assert library.reached["b"].wait(WAIT)
    second = in_thread(shelf.assign, {"digits": "c"})
    while shelf.describe()["digits"]["checkpoint"] != "c":
        pass
    last = library.hold("c")
    gate.set()
    assert library.reached["c"].wait(WAIT)
    assert slot.model.checkpoint == "a", "what is no longer wanted is never in force"
    last.set()
    first.result(WAIT)
    second.result(WAIT)
    assert slot.model.checkpoint == "c"
    assert library.alive() == ["c"]
    assert library.loads == {"a": 1, "b": 1, "c": 1}


def test_an_assignment_while_a_name_is_being_opened_is_not_lost():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    gate = library.hold("a")
    opening = in_thread(shelf.open, "digits")
    assert library.reached["a"].wait(WAIT)
    shelf.assign({"digits": "b"})
    gate.set()
    assert opening.result(WAIT).model.checkpoint == "b"
    assert library.alive() == ["b"] or library.alive() == []


def test_a_name_that_is_forgotten_while_it_is_being_opened_is_not_served():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    gate = library.hold("a")
    opening = in_thread(shelf.open, "digits")
    assert library.reached["a"].wait(WAIT)
    shelf.assign({})
    gate.set()
    with pytest.raises(ValueError, match="not served: give one of none"):
        opening.result(WAIT)


def test_a_version_that_is_evicted_while_the_next_is_loading_is_freed_at_once():
    library = Library()
    shelf = library.shelf()
    shelf.assign({"digits": "a"})
    slot = shelf.open("digits")
    gate = library.hold("b")
    promotion = in_thread(shelf.assign, {"digits": "b"})
    assert library.reached["b"].wait(WAIT)
    del slot
    assert library.alive() == []
    gate.set()
    promotion.result(WAIT)
    assert library.alive() == []
    assert shelf.open("digits").model.checkpoint == "b"


def test_names_that_clients_make_up_leave_nothing_behind():
    library = Library()
    shelf = library.shelf(lambda name: name)
    for index in range(50):
        shelf.open(f"run-{index}")
    gc.collect()
    assert shelf.describe() == {}
    assert len(shelf._turns) == len(shelf._records) == 0

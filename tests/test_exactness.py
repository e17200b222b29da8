"""The sizes found are those that truly agree, whatever makes the others differ."""

import random
from collections import Counter

import pytest
from tiny import unet

from counterpoint.exactness import exact_sizes, unet_rows
from counterpoint.unet import frozen


def kernels(kernel):
    """An `evaluate` whose results tell, beside the row, which kernel it went through at (position, size)."""
    return lambda rows: [(row, kernel(position, len(rows))) for position, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("kernel", "largest", "expected"),
    [
        (lambda position, size: "one for all", 16, (1, 2, 3, 4, 6, 8, 12, 16)),
        (lambda position, size: "one for all", 5, (1, 2, 3, 4, 5)),
        (lambda position, size: "one for all", 1, (1,)),
        (lambda position, size: size >= 4, 16, (4, 6, 8, 12, 16)),
        (lambda position, size: size, 16, (16,)),
        # blocks of four rows, and another kernel for the tail
        (lambda position, size: position < size - size % 4, 16, (4, 8, 12, 16)),
        (lambda position, size: position < size - size % 4, 10, (4, 8)),
        (lambda position, size: position == 0, 16, (1,)),
        (lambda position, size: position == size - 1, 64, (1,)),
    ],
)
def test_sizes_are_those_at_which_every_row_takes_the_same_way(kernel, largest, expected):
    assert exact_sizes(kernels(kernel), largest) == expected


def test_rows_that_feel_their_neighbours_are_evaluated_alone():
    assert exact_sizes(lambda rows: [(row, sum(rows)) for row in rows], 16) == (1,)


def test_rows_that_feel_their_copies_are_evaluated_alone():
    def evaluate(rows):
        return [(row, Counter(rows)[row]) for row in rows]

    assert exact_sizes(evaluate, 8) == (1,)


def test_candidates_may_be_given_and_the_largest_need_not_be_among_them():
    assert exact_sizes(kernels(lambda position, size: 0), 10, candidates=(5, 7, 20)) == (1, 5, 7, 10)


def test_what_differs_from_one_time_to_the_next_is_refused():
    stream = random.Random(0)
    with pytest.raises(ValueError, match="no batch size is exact"):
        exact_sizes(lambda rows: [stream.random() for _ in rows], 8)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="largest=0: pass at least 1"):
        exact_sizes(kernels(lambda position, size: 0), 0)


@pytest.mark.parametrize("agree", [True, False])
def test_trying_costs_little(agree):
    batches = []

    def evaluate(rows):
        batches.append(len(rows))
        return [(row, agree or len(rows)) for row in rows]

    exact_sizes(evaluate, 16)
    assert sum(batches) <= (20 if agree else 10) * 16


@pytest.mark.parametrize("largest", [16, 5])
def test_a_real_networks_rows_have_the_same_bits_at_every_size_found(largest):
    evaluate = unet_rows(frozen(unet()), seed=1)
    sizes = exact_sizes(evaluate, largest)
    expected = {}
    for size in sizes:
        ids = list(range(100, 100 + size))
        for turn in range(size):
            turned = ids[turn:] + ids[:turn]
            for row, found in zip(turned, evaluate(turned), strict=True):
                assert expected.setdefault(row, found) == found, f"row {row} at size {size}, turn {turn}"


def test_a_networks_rows_follow_from_the_seed_and_their_ids():
    network = frozen(unet())
    evaluate = unet_rows(network, seed=1)
    first, second = evaluate([3, 4])
    assert first != second
    assert evaluate([3, 4]) == unet_rows(network, seed=1)([3, 4]) == [first, second]
    assert unet_rows(network, seed=2)([3, 4])[0] != first
    assert unet_rows(frozen(unet(seed=1)), seed=1)([3, 4])[0] != first

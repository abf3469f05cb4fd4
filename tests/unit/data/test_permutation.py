from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathswitch.data.permutation import permutation

BILLIONS = 5_000_000_017


@given(st.integers(1, 3000), st.text(max_size=8))
@settings(max_examples=150, deadline=None)
def test_every_size_is_one_to_one(size: int, key: str) -> None:
    assert np.array_equal(np.sort(permutation(key, size, np.arange(size))), np.arange(size))


@pytest.mark.parametrize("size", [*range(1, 70), 10**6, 10**6 + 3])
def test_small_and_large_sizes_are_one_to_one(size: int) -> None:
    assert np.array_equal(np.sort(permutation("k", size, np.arange(size))), np.arange(size))


@given(st.integers(1, 2**62), st.data())
@settings(max_examples=100, deadline=None)
def test_any_part_of_a_huge_range_stays_inside_and_distinct(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size - 1))
    index = np.arange(first, min(first + 64, size))
    result = permutation("k", size, index)
    assert len(set(result.tolist())) == len(index)
    assert result.min() >= 0
    assert result.max() < size


def test_an_element_does_not_depend_on_the_others_asked_for() -> None:
    whole = permutation("k", 1000, np.arange(1000))
    some = np.array([999, 3, 3, 500])
    assert permutation("k", 1000, some).tolist() == whole[some].tolist()


def reference(key: str, size: int, index: int) -> int:
    """The definition in Python's unbounded integers."""
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    digest = hashlib.sha512(key.encode()).digest()

    def mix(value: int, number: int) -> int:
        value ^= int.from_bytes(digest[8 * number : 8 * number + 8], "little")
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value >> 20

    while True:
        a, b = divmod(index, columns)
        for number in range(0, 8, 2):
            a = (a + mix(b, number)) % rows
            b = (b + mix(a, number + 1)) % columns
        index = a * columns + b
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 1000, 17_000, BILLIONS, 2**40 + 1, 2**62 - 1, 2**62])
def test_it_is_the_definition(size: int) -> None:
    index = np.unique(np.linspace(0, size - 1, 40).astype(np.int64).clip(0, size - 1))
    assert permutation("k", size, index).tolist() == [reference("k", size, int(i)) for i in index]


# These numbers are the order of every run ever started: a change here changes what running models see.
def test_the_order_is_what_it_has_always_been() -> None:
    assert permutation("1234/temporal/0/0", 10, np.arange(10)).tolist() == [4, 2, 8, 3, 9, 5, 0, 1, 7, 6]
    assert permutation("1234/temporal/0/0", 17_000, np.arange(8)).tolist() == [
        1067,
        10602,
        14820,
        16238,
        1439,
        7021,
        9809,
        7495,
    ]
    assert permutation("1234/temporal/0/0", BILLIONS, np.arange(4)).tolist() == [
        4533352344,
        2766647491,
        3079223854,
        1145221038,
    ]
    assert permutation("1234/temporal/0/0", 2**62, np.array([0, 2**62 - 1])).tolist() == [
        3183827452196478108,
        4044366771278196329,
    ]


@pytest.mark.parametrize("size", [17, 100, 256, 1000])
def test_element_zero_goes_everywhere_equally_often(size: int) -> None:
    keys = 20 * size
    places = Counter(int(permutation(f"{key}", size, np.array([0]))[0]) for key in range(keys))
    chi_square = sum((places[place] - 20) ** 2 / 20 for place in range(size))
    assert abs(chi_square - (size - 1)) < 4.5 * math.sqrt(2 * size)


def test_all_orders_of_three_things_come_up_equally_often() -> None:
    counts = Counter(tuple(permutation(f"{key}", 3, np.arange(3)).tolist()) for key in range(3000))
    assert set(counts) == set(itertools.permutations(range(3)))
    assert all(abs(count - 500) < 100 for count in counts.values())


@pytest.mark.parametrize("size", [4096, 17_000, BILLIONS])
def test_neighbours_are_not_correlated(size: int) -> None:
    count = 4096
    result = permutation("k", size, np.arange(count)) / size
    for lag in (1, 2, 3, 7, 64, 65, math.isqrt(size - 1) + 1):
        if lag < count // 2:
            correlation = np.corrcoef(result[:-lag], result[lag:])[0, 1]
            assert abs(correlation) < 4.5 / math.sqrt(count), lag
    assert abs(np.corrcoef(result, np.arange(count))[0, 1]) < 4.5 / math.sqrt(count)


def test_another_key_gives_an_unrelated_order() -> None:
    one, other = (permutation(key, 10_000, np.arange(10_000)) for key in ("1/temporal/0/0", "1/temporal/0/1"))
    assert np.count_nonzero(one == other) < 10
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.045


def test_fixed_points_and_cycles_are_those_of_a_random_order() -> None:
    fixed = [np.count_nonzero(permutation(f"{key}", 500, np.arange(500)) == np.arange(500)) for key in range(400)]
    assert 0.8 < np.mean(fixed) < 1.2
    assert 0.75 < np.var(fixed) < 1.3

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathswitch.data import stream
from pathswitch.data.stream import SampleStream, StreamConfig
from pathswitch.errors import ConfigError, DataError

SEQ_LEN, BATCH = 4, 6


def tokens_of(samples: int, version: int = 0, extra: int = 0) -> npt.NDArray[np.uint16]:
    """Distinct values, so that a sample shows where it came from."""
    return np.arange(samples * SEQ_LEN + 1 + extra, dtype=np.uint16) + 10_000 * version


def make(
    samples: list[int],
    steps: list[int],
    *,
    split: Literal["temporal", "iid"] = "temporal",
    repeat: bool = False,
    seed: int = 7,
    mixed_until: int | None = None,
) -> SampleStream:
    config = StreamConfig(seed=seed, seq_len=SEQ_LEN, batch_size=BATCH, split=split, repeat=repeat)
    texts = [tokens_of(count, version, extra=version) for version, count in enumerate(samples)]
    return SampleStream(texts, steps, [f"v{i + 1}" for i in range(len(samples))], config, mixed_until)


def ids(samples: SampleStream, first: int, last: int) -> list[tuple[int, int]]:
    return [
        (int(version), int(sample))
        for step in range(first, last)
        for version, sample in zip(*samples.sample_ids(step), strict=True)
    ]


def test_every_sample_comes_once_and_from_the_versions_own_text() -> None:
    samples = make([30, 42], [5, 7])
    assert sorted(ids(samples, 0, 5)) == [(0, i) for i in range(30)]
    assert sorted(ids(samples, 5, 12)) == [(1, i) for i in range(42)]
    assert ids(samples, 0, 5) != sorted(ids(samples, 0, 5))


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_no_sample_is_lost_or_repeated_inside_a_pass(size: int, steps: int, seed: int) -> None:
    order = [sample for _, sample in ids(make([size], [steps], repeat=True, seed=seed), 0, steps)]
    for start in range(0, len(order), size):
        one_pass = order[start : start + size]
        assert len(set(one_pass)) == len(one_pass)
        assert set(one_pass) <= set(range(size))


def test_each_pass_has_its_own_order() -> None:
    order = [sample for _, sample in ids(make([30], [10], repeat=True), 0, 10)]
    assert sorted(order[:30]) == sorted(order[30:])
    assert order[:30] != order[30:]


def test_the_batch_holds_the_tokens_of_its_samples() -> None:
    for split in ("temporal", "iid"):
        samples = make([30, 42], [5, 7], split=split)
        for step in (0, 4, 5, 11):
            batch = samples.batch(step)
            assert batch.shape == (BATCH, SEQ_LEN + 1)
            assert batch.dtype == np.int64
            for row, version, sample in zip(batch, *samples.sample_ids(step), strict=True):
                start = 10_000 * version + sample * SEQ_LEN
                assert row.tolist() == list(range(start, start + SEQ_LEN + 1))


def test_last_sample_reaches_the_last_token_and_the_rest_is_no_sample() -> None:
    for extra in range(SEQ_LEN + 1):
        config = StreamConfig(seed=1, seq_len=SEQ_LEN, batch_size=1, repeat=True)
        samples = SampleStream([tokens_of(3, extra=extra)], [8], ["v1"], config)
        assert samples.samples_available == ((4,) if extra == SEQ_LEN else (3,))
        assert max(samples.batch(step).max() for step in range(8)) == SEQ_LEN * samples.samples_available[0]


@pytest.mark.parametrize("split", ["temporal", "iid"])
@pytest.mark.parametrize("mixed_until", [None, 12])
def test_ranks_together_see_the_same_global_batch(split: Any, mixed_until: int | None) -> None:
    samples = make([30, 42], [5, 7], split=split, mixed_until=mixed_until)
    for step in range(12):
        whole = samples.batch(step)
        for world_size in (1, 2, 3, 6):
            parts = [samples.batch(step, rank, world_size) for rank in range(world_size)]
            assert np.array_equal(np.concatenate(parts), whole)


def test_a_further_version_changes_no_earlier_step() -> None:
    short, long = make([30, 42], [5, 7]), make([30, 42, 60], [5, 7, 3])
    for step in range(12):
        assert np.array_equal(short.batch(step), long.batch(step))
    assert set(ids(long, 12, 15)) <= {(2, sample) for sample in range(60)}


def test_the_order_depends_on_the_seed_and_the_version() -> None:
    assert ids(make([60], [10]), 0, 10) != ids(make([60], [10], seed=8), 0, 10)
    both = make([60, 60], [10, 10])
    assert [sample for _, sample in ids(both, 0, 10)] != [sample for _, sample in ids(both, 10, 20)]


# These numbers are the order of every run ever started: a change here changes what running models see.
def test_the_order_is_what_it_has_always_been() -> None:
    assert ids(make([30, 42], [5, 7]), 5, 6) == [(1, 32), (1, 2), (1, 13), (1, 33), (1, 6), (1, 36)]
    assert ids(make([30, 42], [5, 7], split="iid"), 5, 6) == [(1, 26), (1, 20), (1, 18), (1, 22), (1, 29), (1, 40)]
    assert ids(make([30, 42], [5, 7], mixed_until=12), 5, 6) == [(1, 30), (1, 20), (1, 9), (1, 38), (0, 24), (0, 26)]


def test_iid_draws_without_replacement_from_all_text_at_every_time() -> None:
    samples = make([300, 600], [50, 100], split="iid")
    everything = ids(samples, 0, 150)
    assert sorted(everything) == [(0, i) for i in range(300)] + [(1, i) for i in range(600)]
    for first in (0, 50, 100):  # each third holds its share of version 1: 100 of 300, give or take 4 sigma
        share = sum(version == 0 for version, _ in ids(samples, first, first + 50))
        assert abs(share - 100) < 4 * np.sqrt(300 * (1 / 3) * (2 / 3) * (600 / 899))


def test_iid_repeats_pass_after_pass() -> None:
    samples = make([12, 18], [5, 5], split="iid", repeat=True)
    first, second = ids(samples, 0, 5), ids(samples, 5, 10)
    assert sorted(first) == sorted(second) == [(0, i) for i in range(12)] + [(1, i) for i in range(18)]
    assert first != second


@pytest.mark.parametrize("split", ["temporal", "iid"])
@pytest.mark.parametrize("until", [5, 12, 8])
def test_mixed_sees_the_main_paths_samples_in_one_shuffled_order(split: Any, until: int) -> None:
    main = make([20, 42], [5, 7], split=split, repeat=True)
    mixed = make([20, 42], [5, 7], split=split, repeat=True, mixed_until=until)
    assert mixed.total_steps == until
    assert Counter(ids(mixed, 0, until)) == Counter(ids(main, 0, until))
    assert ids(mixed, 0, until) != ids(main, 0, until)


def test_mixed_spreads_every_version_over_the_whole_run() -> None:
    mixed = make([600, 600], [100, 100], mixed_until=200)
    for first in (0, 50, 100, 150):
        share = sum(version for version, _ in ids(mixed, first, first + 50))
        assert abs(share - 150) < 4 * np.sqrt(300 / 4)


def test_samples_needed_and_available_show_the_use_of_the_text() -> None:
    samples = make([30, 100], [5, 7])
    assert samples.samples_needed == (30, 42)
    assert samples.samples_available == (30, 100)


def test_too_little_text_names_version_need_and_remedy() -> None:
    make([30, 42], [5, 7])
    with pytest.raises(ConfigError) as caught:
        make([30, 41], [5, 7])
    message = str(caught.value)
    assert all(part in message for part in ("version v2", "42 samples", "41", "`repeat = true`"))
    assert ids(make([30, 41], [5, 7], repeat=True), 11, 12)


def test_iid_counts_the_pool() -> None:
    make([10, 62], [5, 7], split="iid")
    with pytest.raises(
        ConfigError, match=re.escape("version v1 + v2: given '72 samples (12 steps of 6)'; allowed: up to 71")
    ):
        make([10, 61], [5, 7], split="iid")


def test_steps_outside_the_stream_are_refused() -> None:
    with pytest.raises(ConfigError, match="step: given 12; allowed: 0 to 11"):
        make([30, 42], [5, 7]).sample_ids(12)
    with pytest.raises(ConfigError, match="step: given -1"):
        make([30, 42], [5, 7]).batch(-1)
    with pytest.raises(ConfigError, match="step: given 5; allowed: 0 to 4"):
        make([30, 42], [5, 7], mixed_until=5).batch(5)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 4), (0, 0), (0, 12), (2, 2), (-1, 2)])
def test_bad_ranks_are_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match=r"world_size: given|rank: given"):
        make([30], [5]).batch(0, rank, world_size)


@pytest.mark.parametrize("mixed_until", [0, -1, 13])
def test_bad_mixed_until_is_refused(mixed_until: int) -> None:
    with pytest.raises(ConfigError, match=f"mixed_until: given {mixed_until}; allowed: 1 to 12"):
        make([30, 42], [5, 7], mixed_until=mixed_until)


def test_bad_lists_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 token arrays, 1 step counts, 2 names"):
        make([30, 42], [5])
    with pytest.raises(ConfigError, match="at least one version"):
        make([], [])
    with pytest.raises(ConfigError, match="steps of version v2: given 0"):
        make([30, 42], [5, 0])
    with pytest.raises(DataError, match="version v2: 2 tokens; one sample of seq_len 4 needs 5"):
        make([30, 0], [5, 1])
    with pytest.raises(DataError, match="version v1: 4 tokens"):
        SampleStream([np.zeros(4)], [1], ["v1"], StreamConfig(seed=1, seq_len=4, batch_size=1, repeat=True))


def test_bad_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len: given 0"):
        StreamConfig(seed=1, seq_len=0, batch_size=1)
    with pytest.raises(ConfigError, match="batch_size: given -2"):
        StreamConfig(seed=1, seq_len=1, batch_size=-2)
    with pytest.raises(ConfigError, match=r"temporal, iid \(did you mean 'temporal'\?\)"):
        StreamConfig(seed=1, seq_len=1, batch_size=1, split="temporl")  # type: ignore[arg-type]


@given(st.integers(2, 50), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_windows_hold_every_target_once_after_its_own_input(count: int, seq_len: int) -> None:
    tokens = np.arange(100, 100 + count, dtype=np.uint16)
    inputs, targets = stream.test_windows(tokens, seq_len)
    assert inputs.shape == targets.shape == (-(-(count - 1) // seq_len), seq_len)
    real = targets != stream.IGNORED_TARGET
    assert targets[real].tolist() == list(range(101, 100 + count))
    assert inputs[real].tolist() == list(range(100, 99 + count))
    assert not inputs[~real].any()
    assert real[:-1].all()
    assert (inputs.dtype, targets.dtype) == (np.int64, np.int64)


def test_windows_need_a_target() -> None:
    for count in (0, 1):
        with pytest.raises(DataError, match=f"{count} tokens; allowed: at least 2"):
            stream.test_windows(np.zeros(count, dtype=np.uint16), 4)

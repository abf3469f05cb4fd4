"""Real text and finished runs that several tests look at."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_harness import ROOT, SIZE, Write, pathswitch, write_tiny_plan


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions of real text, 60 kB each to train on."""
    folder = tmp_path_factory.mktemp("corpus")
    for version in ("v1", "v2", "v3"):
        for split, size in (("train", 60_000), ("test", 8_000)):
            with lzma.open(ROOT / f"launch/sotu/{version}_{split}.txt.xz", "rt", encoding="utf-8") as file:
                (folder / f"{version}_{split}.txt").write_text(file.read(size))
    return folder


@pytest.fixture
def write_plan(corpus: Path) -> Write:
    """Write a plan beside the corpus; keyword arguments change it."""
    return lambda *args, **kwargs: write_tiny_plan(corpus, *args, **kwargs)


@pytest.fixture(scope="session")
def two_versions(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a run folder with two versions trained by path switching and by CPT."""
    out = tmp_path_factory.mktemp("two") / "run"
    plan = write_tiny_plan(corpus, "two")
    for paradigm in ("path_switching", "cpt_rewarm"):
        done = pathswitch("run", plan, "--out", out, "--paradigm", paradigm)
        assert done.returncode == 0, done.stdout + done.stderr
    yield out


@pytest.fixture(scope="session")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder of a plan of ``SIZE`` that nothing disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = pathswitch("run", write_tiny_plan(corpus, "faults", **SIZE), "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out

"""The folder of records: what is appended stays, whole, whoever writes and dies beside it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ledger_writer import record as written_record

from pathswitch.errors import LedgerError
from pathswitch.versions import ledger as ledger_module
from pathswitch.versions.ledger import Ledger
from pathswitch.versions.records import (
    BranchRecord,
    CheckpointRecord,
    EvaluationRecord,
    PlanRecord,
    PrunedRecord,
    Record,
    ReleaseRecord,
)

WRITER = Path(__file__).with_name("ledger_writer.py")
CHECKPOINT = CheckpointRecord(
    manifest="a" * 64,
    folder="path_switching/main/checkpoints/global_step80",
    paradigm="path_switching",
    path="main",
    step=80,
    samples_seen=1280,
    tokens_seen=None,
    next_lr=3e-4,
    parent=None,
)
RECORDS: list[Record] = [
    PlanRecord(digest="b" * 64, text='[schedule]\nmax_lr = 1e-3 # ü "quoted"\n' * 5_000),
    CHECKPOINT,
    BranchRecord(
        manifest="c" * 64,
        folder="/elsewhere/ü/global_step80",
        paradigm="path_switching",
        path="v1",
        parent_path="main",
        fork_step=80,
        parent="a" * 64,
        policy={"decay_steps": 120, "shape": {"name": "cosine", "values": [1, 0.5, None, True]}},
    ),
    ReleaseRecord("path_switching/v1/release", "path_switching", "v1", 200, "d" * 64, "e" * 64),
    EvaluationRecord("path_switching", "v1", 200, "d" * 64, {"v1": 64.5, "v2": float("inf")}),
    PrunedRecord("a" * 64, "path_switching/main/checkpoints/global_step80"),
]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "run" / "ledger")


def only_file(ledger: Ledger) -> Path:
    (file,) = ledger.folder.iterdir()
    return file


def store(ledger: Ledger, content: object) -> Path:
    """Write any content under the name that it must have."""
    ledger.folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    file = ledger.folder / f"{hashlib.sha256(data).hexdigest()}.json"
    file.write_bytes(data[:-1] + b',"written_at":"2025-01-01T00:00:00Z"}\n')
    return file


def set_clock(monkeypatch: pytest.MonkeyPatch, now: datetime) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return now

    monkeypatch.setattr(ledger_module, "datetime", Clock)


def test_what_is_appended_is_read(ledger: Ledger) -> None:
    digests = [ledger.append(record) for record in RECORDS]
    content = ledger.read()
    assert {stored.digest: stored.record for stored in content.records} == dict(zip(digests, RECORDS, strict=True))
    assert [stored.digest for stored in content.records] == sorted(digests)
    assert content.damaged == ()


def test_a_missing_folder_is_an_empty_ledger(ledger: Ledger) -> None:
    assert ledger.read().records == ()
    assert not ledger.folder.exists()


def test_a_record_is_one_line_of_json_named_by_the_digest_of_all_but_its_time(ledger: Ledger) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    digest = ledger.append(CHECKPOINT)
    text = only_file(ledger).read_text()
    content = json.loads(text)
    assert text.count("\n") == 1 and text.endswith("\n")
    assert (content["format"], content["kind"], content["tokens_seen"]) == (1, "checkpoint", None)
    assert before <= datetime.fromisoformat(content["written_at"]) <= datetime.now(UTC)
    assert ledger.read().records[0].written_at == content.pop("written_at")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    assert only_file(ledger).name == f"{digest}.json" == f"{hashlib.sha256(canonical).hexdigest()}.json"


def test_the_same_record_is_written_once_by_whoever_comes_first(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ledger.append(CHECKPOINT)
    data = only_file(ledger).read_bytes()
    set_clock(monkeypatch, datetime.now(UTC) + timedelta(days=1))
    assert Ledger(ledger.folder).append(CHECKPOINT) == first
    assert only_file(ledger).read_bytes() == data


def test_a_clock_that_jumps_back_changes_nothing_but_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    orders = []
    for name, direction in (("forward", 1), ("back", -1)):
        ledger = Ledger(tmp_path / name)
        for index, record in enumerate(RECORDS):
            set_clock(monkeypatch, now + direction * timedelta(hours=index))
            ledger.append(record)
        orders.append([(stored.digest, stored.record) for stored in ledger.read().records])
    assert orders[0] == orders[1]


def test_every_damage_is_named_and_hides_no_other_record(ledger: Ledger) -> None:
    ledger.append(RECORDS[0])
    whole = {file.name for file in ledger.folder.iterdir()}
    ledger.append(CHECKPOINT)
    (file,) = [file for file in ledger.folder.iterdir() if file.name not in whole]
    data = file.read_bytes()
    torn = [data[:length] for length in range(len(data))]
    flipped = [data[:i] + bytes([data[i] ^ 64]) + data[i + 1 :] for i in range(len(data))]
    for damaged in [*torn, *flipped, data + b"\n", data * 2]:
        file.write_bytes(damaged)
        content = ledger.read()
        assert [found.file for found in content.damaged] == [file], damaged
        assert [stored.record for stored in content.records] == [RECORDS[0]]
    ledger.append(CHECKPOINT)  # a writer that goes on puts it right
    assert file.read_bytes()[:100] == data[:100]
    assert ledger.read().damaged == ()


def test_files_that_are_no_records_are_named(ledger: Ledger) -> None:
    digest = ledger.append(CHECKPOINT)
    strange = [ledger.folder / name for name in ("notes.txt", f"{'0' * 64}.json", "folder", "link")]
    strange[0].write_text("mine")
    strange[1].write_bytes(only(ledger, digest).read_bytes())
    strange[2].mkdir()
    strange[3].symlink_to("nowhere")
    content = ledger.read()
    assert sorted(found.file for found in content.damaged) == sorted(strange)
    assert all(found.reason for found in content.damaged)
    assert len(content.records) == 1


def only(ledger: Ledger, digest: str) -> Path:
    return ledger.folder / f"{digest}.json"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("step"),
        lambda content: content.update(colour="red"),
        lambda content: content.update(step="80"),
        lambda content: content.update(next_lr=None),
        lambda content: content.update(manifest=1),
        lambda content: content.pop("kind"),
    ],
)
def test_whole_files_with_other_fields_are_damaged(ledger: Ledger, change: Callable[[dict[str, object]], None]) -> None:
    ledger.append(CHECKPOINT)
    content = json.loads(only_file(ledger).read_text())
    del content["written_at"]
    change(content)
    file = store(ledger, content)
    assert [found.file for found in ledger.read().damaged] == [file]
    assert len(ledger.read().records) == 1


def test_a_whole_file_that_is_no_json_object_is_damaged(ledger: Ledger) -> None:
    file = store(ledger, ["format", {"kind": 1}])
    assert [found.file for found in ledger.read().damaged] == [file]


def test_an_lr_of_zero_may_be_written_as_an_integer(ledger: Ledger) -> None:
    ledger.append(CheckpointRecord("a", "f", "ptfs", "v1", 1, 1, 1, 0, None))
    assert [stored.record.kind for stored in ledger.read().records] == ["checkpoint"]


@pytest.mark.parametrize("content", [{"format": 2, "kind": "plan"}, {"format": 1, "kind": "merge"}])
def test_a_record_of_a_newer_release_is_one_clear_error(ledger: Ledger, content: dict[str, object]) -> None:
    ledger.append(CHECKPOINT)
    file = store(ledger, content)
    with pytest.raises(LedgerError, match="reads format 1 with the kinds plan, checkpoint,") as error:
        ledger.read()
    assert str(file) in str(error.value) and repr(content["kind"]) in str(error.value)


def test_what_killed_writers_left_is_ignored(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys; sys.argv[1:] = sys.argv[1:]; os.replace = lambda *_: os._exit(9); "
        f"sys.path.insert(0, {str(WRITER.parent)!r}); from ledger_writer import *; "
        "Ledger(Path(sys.argv[1])).append(record(0, 0))"
    )
    subprocess.run([sys.executable, "-c", code, str(ledger.folder)], timeout=60)
    assert only_file(ledger).name.endswith(".tmp")
    (ledger.folder / ".nfs0001").write_text("kept by the file system")
    assert ledger.read() == Ledger(ledger.folder / "none").read()


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"file.*cannot be written"):
        Ledger(tmp_path / "file").append(CHECKPOINT)


def test_a_record_is_durable_when_append_returns(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync = os.fsync

    def logged(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(target.name if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "record")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", logged)
    ledger.append(CHECKPOINT)
    assert events == ["run", "record", "ledger"]
    events.clear()
    ledger.append(CHECKPOINT)  # another writer may have been killed before it synced the folder
    assert events == ["ledger"]


def test_a_short_first_read_is_not_damage(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for record in RECORDS:
        ledger.append(record)
    monkeypatch.setattr(ledger_module, "_READ_SIZE", 10)
    content = ledger.read()
    assert (len(content.records), content.damaged) == (len(RECORDS), ())


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: 32,000 syncs of a disk would take minutes."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def start_writer(folder: Path, writer: int, count: int, log: str) -> subprocess.Popen[bytes]:
    arguments = [str(folder / "ledger"), str(folder / log), str(writer), str(count)]
    return subprocess.Popen([sys.executable, str(WRITER), *arguments])


def test_writers_of_the_same_records_do_not_disturb_each_other(fast_folder: Path) -> None:
    jobs = [start_writer(fast_folder, 0, 300, f"{index}.log") for index in range(4)]
    assert [job.wait(timeout=120) for job in jobs] == [0] * 4
    content = Ledger(fast_folder / "ledger").read()
    assert (len(content.records), content.damaged) == (300, ())
    assert len(os.listdir(fast_folder / "ledger")) == 300


@pytest.mark.slow
def test_writers_that_are_killed_at_any_moment_lose_nothing_and_garble_nothing(fast_folder: Path) -> None:
    writers, count, dice = range(8), 2_000, random.Random(7)
    ledger, line = Ledger(fast_folder / "ledger"), 65
    ends = {writer: sorted(dice.sample(range(1, count - 200), 6)) for writer in writers}
    jobs = {writer: start_writer(fast_folder, writer, count, f"{writer}.log") for writer in writers}
    killed = 0
    while any(ends.values()):
        writer = dice.choice([writer for writer in writers if ends[writer]])
        log = fast_folder / f"{writer}.log"
        if log.is_file() and log.stat().st_size >= ends[writer][0] * line:
            time.sleep(dice.uniform(0, 0.001))
            jobs[writer].send_signal(signal.SIGKILL)
            killed += jobs[writer].wait() == -signal.SIGKILL
            noted = log.stat().st_size // line
            ends[writer] = [end for end in ends[writer] if end > noted]
            jobs[writer] = start_writer(fast_folder, writer, count, log.name)
            if killed % 8 == 0:
                check(ledger, fast_folder)
        time.sleep(0.0005)
    assert killed >= len(writers)
    assert [jobs[writer].wait(timeout=120) for writer in writers] == [0] * len(writers)
    check(ledger, fast_folder)
    assert any(name.endswith(".tmp") for name in os.listdir(ledger.folder)), "no writer was killed while it wrote"
    expected = {written_record(writer, step) for writer in writers for step in range(count)}
    stored = [stored.record for stored in ledger.read().records]
    assert len(stored) == len(expected) == len(writers) * count
    assert set(stored) == expected


def check(ledger: Ledger, logs: Path) -> None:
    """Everything that a writer had noted as appended is in the ledger, and nothing in it is damaged."""
    noted = {line for log in logs.glob("*.log") for line in log.read_text().split("\n")[:-1]}
    content = ledger.read()
    assert content.damaged == ()
    assert noted <= {stored.digest for stored in content.records}

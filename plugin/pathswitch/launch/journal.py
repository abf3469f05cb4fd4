"""What has happened to the jobs of a run, as records in its ledger."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pathswitch.versions.ledger import StoredRecord, run_ledger
from pathswitch.versions.records import JOB_EVENTS, JobRecord


@dataclass(frozen=True)
class Event:
    """One record, with its time."""

    record: JobRecord
    written_at: str


@dataclass(frozen=True)
class Journal:
    """The events of one path's job in a run's ledger."""

    run: Path
    paradigm: str
    path: str

    def write(self, event: str, attempt: str, step: int | None = None, reason: str | None = None) -> None:
        """Record an event, once."""
        assert event in JOB_EVENTS
        run_ledger(self.run).append(JobRecord(self.paradigm, self.path, event, attempt, step, reason))

    def read(self) -> list[Event]:
        """Return the path's events, the oldest first."""
        return events_by_path(run_ledger(self.run).read().records).get((self.paradigm, self.path), [])

    def fruitless_starts(self, step: int) -> int:
        """Return how many starts, since a job gave up last, have not come beyond ``step``.

        Those that were asked to stop do not count; one after which nobody wrote down how it ended does, as after the
        loss of a node.
        """
        records = [event.record for event in self.read()]
        given_up = max((index for index, record in enumerate(records) if record.event == "gave up"), default=-1)
        asked = {record.attempt for record in records if record.event in ("stopped", "cancelled")}
        starts = [record for record in records[given_up + 1 :] if record.event == "started"]
        return sum(record.step == step and record.attempt not in asked for record in starts)


def events_by_path(records: Iterable[StoredRecord]) -> dict[tuple[str, str], list[Event]]:
    """Return the events of each path (by paradigm and path), the oldest first."""
    found: dict[tuple[str, str], list[Event]] = {}
    for stored in records:
        if isinstance(record := stored.record, JobRecord):
            found.setdefault((record.paradigm, record.path), []).append(Event(record, stored.written_at))
    for events in found.values():
        events.sort(key=_order)
    return found


def _order(event: Event) -> tuple[str, int, int, int]:
    """Times are whole seconds; within one, order as things happen to a job."""
    record, start = event.record, event.record.attempt.partition(".")[2]
    return (
        event.written_at,
        int(start) if start.isdecimal() else -1,
        JOB_EVENTS.index(record.event),
        record.step or 0,
    )

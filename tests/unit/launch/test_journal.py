"""What has happened to a job: its order, and what counts against the budget of restarts."""

from __future__ import annotations

import itertools
from pathlib import Path

from pathswitch.launch.journal import Journal, events_by_path
from pathswitch.versions.ledger import StoredRecord
from pathswitch.versions.records import JobRecord

# As they happen to a job, the last ones in one start of an agent: the path has several parts.
HAPPENED = [
    ("submitted", "7", None),
    *((event, f"7.{start}", 0) for start in (0, 2, 9, 10) for event in ("started", "failed")),
    *(("started", "7.11", step) for step in (40, 60, 100, 180, 240)),
    ("completed", "7.11", 300),
]


def test_events_of_one_second_are_in_the_order_in_which_they_happen_to_a_job() -> None:
    records = [JobRecord("path_switching", "main", *event, None) for event in HAPPENED]
    for order in (records, records[::-1], sorted(records, key=str)):
        stored = [StoredRecord("", record, "2025-01-01T00:00:00Z") for record in order]
        (events,) = events_by_path(stored).values()
        assert [event.record for event in events] == records


def test_a_later_second_goes_before_everything_else() -> None:
    events = [("completed", "7.9", 300), ("submitted", "8", None), ("started", "8.0", 300)]
    times = itertools.count(1)
    stored = [
        StoredRecord("", JobRecord("path_switching", "main", *event, None), f"2025-01-01T00:00:0{next(times)}Z")
        for event in events
    ]
    (found,) = events_by_path(stored[::-1]).values()
    assert [event.record.event for event in found] == [event for event, *_ in events]


def test_what_a_job_has_done_before_it_gave_up_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "path_switching", "main")
    for start in range(3):
        journal.write("started", f"7.{start}", 0)
    journal.write("gave up", "7.2", 0, "no luck")
    assert journal.fruitless_starts(0) == 0
    journal.write("started", "8.3", 0)
    journal.write("cancelled", "8.3", 0, "by me")
    journal.write("started", "8.4", 0)
    assert journal.fruitless_starts(0) == 1
    Journal(tmp_path, "path_switching", "v1").write("started", "9.0", 0)
    assert journal.fruitless_starts(0) == 1

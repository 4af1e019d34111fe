"""The checker can fail: each rule is broken once, by hand; and a plain loop of another framework breaks one."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from headwater.runtime.history import History
from headwater.runtime.lane import Attempted
from headwater.runtime.retry_topic import DeadLetter, SourceRecord
from headwater.settings import Settings
from headwater.testing.history import Effect, Evidence, Line, SourceEvent, Violation, check, gather
from tests.conftest import Engine
from tests.kit.clients import Confluent, Sent, wait_until


def lines(*events: tuple) -> list[Line]:
    """(event, token, offset[, fields])"""
    found = []
    for place, (event, token, offset, *fields) in enumerate(events):
        found.append(Line(place, 0, place, event, 0, token, offset, fields[0] if fields else {}))
    return found


SOURCE = {0: {offset: SourceEvent(b"k", b"v%d" % offset, [], f"id{offset}") for offset in range(5)}}


def letter(offset: int, attempts: int = 3, value: bytes | None = None) -> DeadLetter:
    source = SourceRecord(offset, b"k", value if value is not None else b"v%d" % offset, [], 0)
    return DeadLetter(0, 0, source, "t", "g", "i", Attempted(attempts, 0, 0, "transient", "e"), 0)


ALL_OK = [("assign", 1, None, {"n": 3, "hold": False})] + [("ok", 1, offset) for offset in range(5)]


def broken(
    events: list[tuple],
    committed: int = 5,
    letters: tuple[DeadLetter, ...] = (),
    effects: list[Effect] | None = None,
    parked: frozenset[int] = frozenset(),
) -> list[str]:
    evidence = Evidence(lines(*events), SOURCE, {0: committed}, {0: set(parked)}, letters, effects)
    return sorted({violation.rule for violation in check(evidence).violations})


def test_a_clean_run_is_clean() -> None:
    """No rule is broken by what a handler does that handles everything in order."""
    effects = [Effect(f"id{offset}", "k", offset) for offset in range(5)]
    assert broken([*ALL_OK, ("commit", 1, 5)], effects=effects) == []


def test_each_rule_can_be_broken() -> None:
    """C1 to C8, each by the smallest history that breaks it."""
    assert broken(ALL_OK[:4]) == ["C1"]
    assert broken(ALL_OK[:4], parked=frozenset({3, 4})) == []
    assert broken([*ALL_OK[:2], ("ok", 2, 2), ("ok", 3, 1), ("ok", 2, 3), ("ok", 2, 4)]) == ["C2"]
    assert broken([*ALL_OK, ("ok", 1, 2)]) == ["C3"]
    assert broken([*ALL_OK, ("ok", 2, 2), ("ok", 2, 3), ("ok", 2, 4)]) == []
    assert broken([*ALL_OK[:2], ("park", 1, 1), ("ok", 1, 2), ("ok", 2, 3), ("ok", 2, 4)], parked=frozenset({1})) == [
        "C4"
    ]
    assert broken(ALL_OK, effects=[Effect("id1", "k", 1), Effect("id1", "k", 2)]) == ["C5"]
    assert broken(ALL_OK, effects=[Effect("id2", "k", 1), Effect("id1", "k", 2)]) == ["C5"]
    assert broken([*ALL_OK[:3], ("commit", 1, 4), *ALL_OK[3:]]) == ["C6"]
    assert broken([*ALL_OK[:5], ("dead", 1, 4)], letters=(letter(4, attempts=2),)) == ["C7"]
    assert broken([*ALL_OK[:5], ("dead", 1, 4)], letters=(letter(4, value=b"other"),)) == ["C7"]
    assert broken([*ALL_OK[:5], ("dead", 1, 4)], letters=(letter(4),)) == []
    held = [("assign", 1, None, {"n": 3, "hold": True}), ("ok", 1, 0), ("dead", 1, 1)]
    assert broken([*held, ("ok", 1, 2), ("ok", 1, 3), ("ok", 1, 4)], letters=(letter(1),)) == ["C8"]
    assert broken([*held, ("done", 1, 1), ("ok", 1, 2), ("ok", 1, 3), ("ok", 1, 4)], letters=(letter(1),)) == []


def test_at_most_once_is_checked_by_its_own_rule() -> None:
    """C9: it commits first, so C1 and C6 say nothing; nothing is started twice, but what was redriven."""
    begun = ("assign", 1, None, {"n": 3, "hold": False, "first": True})
    committed = [begun, ("commit", 1, 5), ("start", 1, 0), ("ok", 1, 0), ("start", 1, 1)]
    assert broken(committed) == []
    assert broken([*committed, ("start", 2, 1)]) == ["C9"]
    assert broken([*committed, ("park", 2, 1), ("start", 2, 1)]) == []


def test_a_violation_names_its_rule_and_offsets() -> None:
    """What a person reads."""
    assert str(Violation("C2", 3, (7, 9), "late")) == "C2 partition 3 offsets 7, 9: late"


FASTSTREAM = """
    import asyncio, sys
    from faststream import FastStream
    from faststream.confluent import KafkaBroker, KafkaMessage
    from headwater.runtime.history import History

    servers, topic, folder = sys.argv[1:4]
    broker = KafkaBroker(servers, logger=None)
    history = History(folder)

    @broker.subscriber(topic, group_id="plain", auto_offset_reset="earliest")
    async def handle(body: dict, message: KafkaMessage) -> None:
        offset = message.raw_message.offset()
        history.write("start", "plain", 0, 1, o=offset)
        await asyncio.sleep(0.02)
        history.write("ok", "plain", 0, 1, o=offset)

    asyncio.run(FastStream(broker, logger=None).run())
"""


def test_another_frameworks_plain_loop_is_found_out(embedded: Engine, unique: str, tmp_path: Path) -> None:
    """S001.16: a handler of FastStream with its defaults, killed at work: C1 names the events that are gone."""
    settings = Settings(embedded.bootstrap_servers)
    records = [Sent(b"k", b'{"number": %d}' % i) for i in range(400)]
    Confluent().produce(embedded.bootstrap_servers, unique, records)
    (tmp_path / "plain.py").write_text(textwrap.dedent(FASTSTREAM))
    command = [
        sys.executable,
        str(tmp_path / "plain.py"),
        embedded.bootstrap_servers,
        unique,
        str(tmp_path / "history"),
    ]

    def oks() -> int:
        return sum(path.read_text().count('"ok"') for path in (tmp_path / "history").glob("*"))

    for _ in range(20):  # the default acknowledges before it handles, at intervals: any kill may meet it
        before = oks()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
        try:
            wait_until(lambda before=before: oks() > before + 5, "the handler at work", 60)  # type: ignore[misc]
            time.sleep(0.3)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        evidence = gather(settings, str(tmp_path / "history"), "plain", unique)
        report = check(evidence)
        if report.violations:
            break

    assert report.violations, "it never lost anything"
    assert report.violations[0].rule in ("C1", "C3")


def test_histories_are_read_up_to_a_torn_line(tmp_path: Path) -> None:
    """A process that was killed while it wrote leaves half a line: the others count."""
    from headwater.testing.history import read_lines

    history = History(str(tmp_path))
    history.write("ok", "g", 0, 1, o=7)
    history.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + json.dumps({"e": "ok"}).encode()[:5])

    assert [line.offset for line in read_lines(str(tmp_path), "g")] == [7]


@pytest.mark.parametrize("torn", [b"", b"\xff\xfe"])
def test_a_folder_without_histories_has_none(tmp_path: Path, torn: bytes) -> None:
    """Nothing is made up."""
    from headwater.testing.history import read_lines

    (tmp_path / "other.txt").write_bytes(torn)

    assert read_lines(str(tmp_path), "g") == []

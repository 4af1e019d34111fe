"""Audits: the format by a worked example, the verifier by random tampering, the whole on both engines."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from typer.testing import CliRunner

from headwater import App, Audit, Event, Topic
from headwater.event.codec import Decoder
from headwater.kafka.admin import KafkaAdmin
from headwater.runtime.handler import InvalidHandler
from headwater.runtime.subscription import CannotStart
from headwater.trust import auditor, chain
from headwater.trust.audit import InvalidAudit
from headwater.trust.verifier import Fault, Verifier
from tests.conftest import Engine, Evidence
from tests.kit.clients import Confluent, wait_until
from tests.kit.commands import commands
from tests.kit.running import Running, settings_for


class Placed(Event):
    order_id: str
    cents: int


class Paid(Event):
    order_id: str


class Record(NamedTuple):
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, Any]]


# The format


def test_the_worked_example_is_right() -> None:
    """What the format's page says of one event is what is computed, by the writer and by the verifier."""
    digest = chain.digest_of(b"k", b"v", [])
    first = chain.beginning("audit", 0)
    link = chain.Link("orders:2:7", "id", 1000, chain.Kept.COPY, digest)
    head = chain.after(first, link)
    page = chain.__doc__ or ""
    for value in (digest, first.hash.hex(), head.hash.hex()):
        assert value in page
    verifier = Verifier("audit", 0)
    verifier.feed(0, b"k", b"v", chain.headers_of_link(link, head))
    assert (verifier.findings, verifier.sequence, verifier.hash) == ([], 1, head.hash.hex())


def written(count: int, *, copies: bool = True) -> list[Record]:
    """A chain, as it is written."""
    head = chain.beginning("audit", 0)
    records = []
    for i in range(count):
        key, value = (f"k{i % 3}".encode(), f"value {i}".encode()) if i % 7 else (b"k", None)
        headers: list[tuple[str, Any]] = [("name", b"content"), ("empty", None)][: i % 3]
        digest = chain.digest_of(key, value, headers)
        kept = chain.Kept.COPY if copies else chain.Kept.DIGEST
        link = chain.Link(f"orders:{i % 2}:{i // 2}", "id", 1000 + i, kept, digest)
        head = chain.after(head, link)
        own = chain.headers_of_link(link, head)
        records.append(Record(key, value, [*headers, *own]) if copies else Record(None, None, own))
    return records


def verified(records: list[Record], **expected: Any) -> Verifier:
    verifier = Verifier("audit", 0)
    for offset, record in enumerate(records):
        verifier.feed(offset, record.key, record.value, record.headers)
    verifier.end()
    return verifier


@pytest.mark.parametrize("copies", [True, False])
def test_what_was_written_is_found_right(copies: bool) -> None:
    """With copies, and with digests alone."""
    verifier = verified(written(200, copies=copies))
    assert verifier.findings == []
    assert (verifier.sequence, verifier.records, verifier.spare) == (200, 200, 0)


def flipped(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]


def test_every_change_of_a_byte_is_found() -> None:
    """S001.14: whatever bit of whatever record is turned, in its key, value, or any header, one record is named and no other."""
    records = written(40)
    for seed in range(2000):
        chance = random.Random(seed)
        at = chance.randrange(len(records))
        record = records[at]
        fields = ["key"] + ["value"] * (record.value is not None) + ["header"] * len(record.headers)
        field = chance.choice(fields)
        if field == "key":
            changed = record._replace(key=flipped(record.key or b"", chance))
        elif field == "value":
            changed = record._replace(value=flipped(record.value or b"", chance))
        else:
            i = chance.randrange(len(record.headers))
            name, content = record.headers[i]
            if content is None:
                continue
            headers = list(record.headers)
            headers[i] = (name, flipped(content, chance))
            changed = record._replace(headers=headers)
        found = verified([*records[:at], changed, *records[at + 1 :]]).findings
        assert [finding.fault for finding in found] == [Fault.CHANGED], (seed, field, found)
        assert found[0].offset == at


def test_a_copy_that_was_taken_away_is_found() -> None:
    """S001.14: a record of which only the audit's own headers are left is no digest, nor is one made of a copy; and nothing is
    put beside a digest."""
    copies, digests = written(40), written(40, copies=False)
    bare = copies[10]._replace(key=None, value=None, headers=copies[10].headers[-chain.LINK_HEADERS :])
    renamed = bare._replace(headers=[(name, b"digest" if name == chain.KEPT else had) for name, had in bare.headers])
    for records, tampered in (
        (copies, bare),
        (copies, renamed),
        (digests, digests[10]._replace(key=b"k")),
        (digests, digests[10]._replace(headers=[("name", b"content"), *digests[10].headers])),
    ):
        found = verified([*records[:10], tampered, *records[11:]]).findings
        assert [(finding.fault, finding.offset) for finding in found] == [(Fault.CHANGED, 10)]


@pytest.mark.parametrize("seed", range(50))
def test_what_is_removed_moved_or_put_in_is_found(seed: int) -> None:
    """S001.14: with the records that it is about, and what is behind them is right again."""
    chance = random.Random(seed)
    records = written(60)
    at = chance.randrange(0, 55)
    count = chance.randrange(1, 4)

    removed = verified(records[:at] + records[at + count :])
    assert [finding.fault for finding in removed.findings] == [Fault.MISSING]
    assert removed.findings[0].offset == at

    swapped = [*records[:at], records[at + 1], records[at], *records[at + 2 :]]
    found = verified(swapped)
    assert [finding.fault for finding in found.findings] == [Fault.MISSING, Fault.MOVED]

    forged = chain.Link("orders:0:999", "id", 5, chain.Kept.COPY, chain.digest_of(b"x", b"y", []))
    head = chain.after(chain.link_in(records[at].headers)[1], forged)  # type: ignore[index]
    inserted = Record(b"x", b"y", chain.headers_of_link(forged, head))
    found = verified([*records[: at + 1], inserted, *records[at + 1 :]])
    assert {finding.fault for finding in found.findings} <= {Fault.INSERTED, Fault.CHANGED}
    assert found.findings

    stranger = Record(b"x", b"y", [("name", b"content")])
    assert [f.fault for f in verified([*records[:at], stranger, *records[at:]]).findings] == [Fault.INSERTED]

    spare = verified([*records[: at + 1], records[at], *records[at + 1 :]])
    assert (spare.findings, spare.spare) == ([], 1)


def test_an_end_that_was_cut_off_is_found_by_its_head() -> None:
    """As long as somebody has kept it."""
    records = written(30)
    whole = verified(records)
    verifier = Verifier("audit", 0)
    verifier.expect(whole.sequence, whole.hash)
    for offset, record in enumerate(records[:-4]):
        verifier.feed(offset, record.key, record.value, record.headers)
    verifier.end()
    assert [finding.fault for finding in verifier.findings] == [Fault.HEAD]


# The whole


class World:
    def __init__(self, engine: Engine, name: str, *, copies: bool = True, partitions: int = 2) -> None:
        self.engine = engine
        while (
            partitions > 1 and len({auditor.chain_of((f"{name}.placed", i), partitions) for i in range(3)}) < partitions
        ):
            name += "x"  # each chain has something to audit
        self.name = name
        self.placed = Topic(f"{name}.placed", key="order_id", events=[Placed], partitions=3)
        self.paid = Topic(f"{name}.paid", key="order_id", events=[Paid], partitions=2)
        self.audit = Audit(
            f"{name}-audit", topic=f"{name}.trail", of=[self.placed, self.paid], partitions=partitions, copies=copies
        )
        self.count = 0

    def app(self) -> App:
        app = App("auditor", settings=settings_for(self.engine), topics=[self.placed, self.paid])
        self.audit.join(app)
        return app

    def publish(self, count: int) -> None:
        app = App("shop", settings=settings_for(self.engine), topics=[self.placed, self.paid])

        async def publish() -> None:
            async with app.lifespan():
                for i in range(self.count, self.count + count):
                    await app.publish_all([Placed(f"o-{i}", i), Paid(f"o-{i}")])

        asyncio.run(publish())
        self.count += count

    def run(self, *arguments: str) -> tuple[int, Any]:
        result = CliRunner().invoke(
            commands, ["audit", *arguments, "--bootstrap-servers", self.engine.bootstrap_servers, "--json"]
        )
        return result.exit_code, json.loads(result.stdout) if result.stdout.strip() else result.stderr

    def verify(self, *arguments: str) -> tuple[int, Any]:
        of = ("--of", self.placed.name, "--of", self.paid.name)
        return self.run("verify", self.audit.topic.name, *of, *arguments)

    def is_done(self) -> bool:
        admin = KafkaAdmin(settings_for(self.engine))
        places = [(t.name, i) for t in (self.placed, self.paid) for i in range(t.partitions)]
        committed = admin.committed(self.audit.name)
        ends = admin.end_offsets(places)
        if any(place not in committed or committed[place].offset < end for place, end in ends.items()):
            return False
        chains = [(self.audit.topic.name, i) for i in range(self.audit.topic.partitions)]
        return admin.last_stable_offsets(chains) == admin.end_offsets(chains)  # a transaction's markers come later

    def records(self) -> list[Any]:
        count = 2 * self.count
        return list(Confluent().consume(self.engine.bootstrap_servers, self.audit.topic.name, count))


MODULE = """
    from headwater import App, Audit, Event, Topic

    class Placed(Event):
        order_id: str
        cents: int

    class Paid(Event):
        order_id: str

    placed = Topic("{name}.placed", key="order_id", events=[Placed], partitions=3)
    paid = Topic("{name}.paid", key="order_id", events=[Paid], partitions=2)
    app = App("auditor", topics=[placed, paid])
    Audit("{name}-audit", topic="{name}.trail", of=[placed, paid], partitions=2).join(app)

    import os, random
    from headwater.runtime import crash_point

    deadly = os.environ.get("AUDIT_DIES_AT")
    if deadly is not None:
        point, count = deadly.split(":")
        left = int(count)

        def hook(name):
            global left
            if name == point:
                left -= 1
                if left <= 0:
                    os.kill(os.getpid(), 9)

        crash_point.hook = hook
"""


def started(world: World, folder: Path, **environment: str) -> "subprocess.Popen[bytes]":
    module = f"audited_{world.name}"
    (folder / f"{module}.py").write_text(textwrap.dedent(MODULE.format(name=world.name)))
    return subprocess.Popen(
        [sys.executable, "-m", "headwater", "run", f"{module}:app"],
        env={**os.environ, "HEADWATER_BOOTSTRAP_SERVERS": world.engine.bootstrap_servers,
             "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), **environment},
        cwd=folder,
    )  # fmt: skip


@pytest.mark.parametrize("copies", [True, False])
def test_every_event_has_its_record(engine: Engine, unique: str, copies: bool) -> None:
    """S001.14: every event of every topic has exactly one audit record; nobody audits twice after a restart. (both engines)"""
    world = World(engine, unique, copies=copies)
    for _ in range(2):
        with Running(world.app()):
            world.publish(100)
            wait_until(world.is_done, "all events to be audited")
    code, found = world.verify()
    assert (code, found["records"], found["events"], found["spare"], found["found"]) == (0, 400, 400, 0, [])
    if copies:
        decoder = Decoder([Placed, Paid])
        events = [decoder.decode(record.value).data for record in world.records()]
        assert {event for event in events if isinstance(event, Placed)} == {Placed(f"o-{i}", i) for i in range(200)}
    else:
        assert {(record.key, record.value) for record in world.records()} == {(None, None)}


POINTS = ("audit_sent", "audit_acknowledged", "audit_committed")


def kill_at_every_point(world: World, folder: Path, rounds: int) -> dict[str, Any]:
    """What the verifier says afterwards, and the hits."""
    world.publish(1)
    hits = 0
    with Running(world.app()):
        for round_ in range(rounds):
            for point in POINTS:
                # static: its successor needn't wait for its session to end
                process = started(world, folder, AUDIT_DIES_AT=f"{point}:{1 + round_ % 3}",
                                  HEADWATER_KAFKA_GROUP_INSTANCE_ID="dying")  # fmt: skip
                deadline = time.monotonic() + 60
                try:
                    while process.poll() is None and time.monotonic() < deadline:
                        world.publish(5)
                    assert process.poll() == -signal.SIGKILL
                finally:
                    process.kill()
                    process.wait()
                hits += 1
        wait_until(world.is_done, "all events to be audited", 60)
    code, found = world.verify()
    assert (code, found["found"]) == (0, []), found
    assert found["events"] == found["records"] - found["spare"] == 2 * world.count
    if not world.engine.is_embedded:
        assert found["spare"] == 0, "transactions leave no copy too many"
    return {**found, "hits": hits}


def test_kill_9_at_every_point_audits_each_event_once(engine: Engine, unique: str, tmp_path: Path) -> None:
    """S001.14: two processes, one of them killed when records were sent, acknowledged, committed, with events under way.
    (both engines)"""
    assert kill_at_every_point(World(engine, unique), tmp_path, 1)["hits"] == 3


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_kills_at_every_point(engine: Engine, unique: str, tmp_path: Path, evidence: Evidence) -> None:
    """S001.14: ten of each. (both engines)"""
    found = kill_at_every_point(World(engine, unique), tmp_path, 10)
    evidence.write("audit-kill-9", {"engine": engine.name, "kills": found["hits"], "events": found["events"],
                                    "copies too many": found["spare"], "findings": 0})  # fmt: skip


def test_a_writer_that_was_suspended_spoils_no_chain(engine: Engine, unique: str, tmp_path: Path) -> None:
    """Stopped for longer than its session while it writes, another takes over; when it wakes, the chain is whole. (both
    engines)"""
    world = World(engine, unique, partitions=2)
    world.publish(20)
    first = started(world, tmp_path)
    try:
        wait_until(world.is_done, "the first to audit")
        for _ in range(2):
            world.publish(200)
            first.send_signal(signal.SIGSTOP)
            with Running(world.app()):
                world.publish(50)
                wait_until(world.is_done, "the other to audit", 60)
            first.send_signal(signal.SIGCONT)
            world.publish(50)
            wait_until(world.is_done, "the first to go on", 60)
    finally:
        first.send_signal(signal.SIGCONT)
        first.kill()
        first.wait()
    code, found = world.verify()
    assert (code, found["found"]) == (0, []), found
    assert found["events"] == found["records"] - found["spare"] == 2 * world.count


def test_what_somebody_rewrites_is_found(engine: Engine, unique: str, tmp_path: Path) -> None:
    """S001.14: the audit topic is made anew with a changed byte, without a record, with two exchanged, cut off: the verifier
    says what and where. (both engines)"""
    world = World(engine, unique, partitions=1)
    with Running(world.app()):
        world.publish(30)
        wait_until(world.is_done, "all events to be audited")
    code, heads = world.run("head", world.audit.topic.name)
    kept = tmp_path / "heads.json"
    kept.write_text(json.dumps(heads))
    assert (code, heads[0]["sequence"]) == (0, 60)
    records = [Record(each.key, each.value, list(each.headers)) for each in world.records()]
    admin = KafkaAdmin(settings_for(engine))

    def rewrite(changed: list[Record]) -> None:
        admin.delete_topic(world.audit.topic.name)
        wait_until(lambda: world.audit.topic.name not in admin.topic_names(), "the topic to go")
        admin.create_topic(world.audit.topic.name, 1)
        producer = Producer({"bootstrap.servers": engine.bootstrap_servers})
        for record in changed:
            producer.produce(world.audit.topic.name, record.value, record.key, 0, headers=record.headers)
        assert producer.flush(30) == 0

    value = records[20].value or b""
    changed = records[20]._replace(value=value.replace(b'"cents":', b'"cents":1').replace(b"orderId", b"orderid"))
    for tampered, faults in (
        ([*records[:20], changed, *records[21:]], ["changed"]),
        (records[:20] + records[21:], ["missing", "not audited"]),
        (records[5:], ["missing"] + ["not audited"] * 5),
        ([*records[:20], records[21], records[20], *records[22:]], ["missing", "moved"]),
        (records[:-1], ["head"]),
    ):
        rewrite(tampered)
        code, found = world.verify("--head", str(kept))
        assert code == 1
        assert [each["fault"] for each in found["found"]] == faults, found
        code, said = world.run("head", world.audit.topic.name)
        assert code == (0 if faults == ["head"] else 1)
        assert code == 0 or "is not what was written" in said
    rewrite(records)
    assert world.verify("--head", str(kept))[0] == 0


def test_an_audit_that_lost_its_commits_reads_its_chain(embedded: Engine, unique: str) -> None:
    """Its group is gone, as after a week without members: nothing is audited twice."""
    world = World(embedded, unique)
    with Running(world.app()):
        world.publish(50)
        wait_until(world.is_done, "all events to be audited")
    KafkaAdmin(settings_for(embedded)).delete_group(world.audit.name)
    with Running(world.app()):
        world.publish(50)
        wait_until(world.is_done, "all events to be audited")
    code, found = world.verify()
    assert (code, found["records"], found["spare"]) == (0, 200, 0)


def test_the_verifiers_errors_say_what_to_do(embedded: Engine, unique: str, tmp_path: Path) -> None:
    """A topic that isn't there, or has other records; a head that is none."""
    world = World(embedded, unique)
    world.publish(1)
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    for arguments, words in (
        (("verify", "none"), "there is no topic none"),
        (("verify", world.placed.name, "--head", str(bad)), "is not what `headwater audit head --json` prints"),
        (("head", world.placed.name), "is no audit topic: none of its 1 records"),
        (("verify", world.placed.name), "is no audit topic: none of its 1 records"),
    ):
        code, said = world.run(*arguments)
        assert code == 1
        assert words in said


CHAINS_OF_ORDERS = [3, 1, 2, 1, 2, 1, 3, 1]


def test_a_trimmed_audit_says_where_it_begins(embedded: Engine, unique: str, tmp_path: Path) -> None:
    """What retention has taken is no fault; that it went through a head that was kept, is."""
    world = World(embedded, unique, partitions=1)
    with Running(world.app()):
        world.publish(20)
        wait_until(world.is_done, "all events to be audited")
        kept = tmp_path / "heads.json"
        kept.write_text(json.dumps(world.run("head", world.audit.topic.name)[1]))
        world.publish(20)
        wait_until(world.is_done, "all events to be audited")
    client = AdminClient({"bootstrap.servers": embedded.bootstrap_servers})
    for future in client.delete_records([TopicPartition(world.audit.topic.name, 0, 50)]).values():
        future.result(10)
    code, found = world.verify()
    assert (code, found["records"], found["findings"]) == (0, 30, 0)
    assert found["before"] + found["events"] == 80
    code, found = world.verify("--head", str(kept))
    assert [each["fault"] for each in found["found"]] == ["head"]
    with Running(world.app()):
        world.publish(5)
        wait_until(world.is_done, "all events to be audited")
    assert world.verify()[1]["records"] == 40


def test_an_event_may_have_headers_like_an_audits(embedded: Engine, unique: str) -> None:
    """They are the event's, whatever they are called."""
    world = World(embedded, unique)
    producer = Producer({"bootstrap.servers": embedded.bootstrap_servers})
    world.publish(1)
    producer.produce(world.placed.name, b"{}", b"k", headers=[("headwater-audit-sequence", b"7"), ("x", None)])
    assert producer.flush(10) == 0
    with Running(world.app()):
        wait_until(world.is_done, "all events to be audited")
    code, found = world.verify()
    assert (code, found["records"], found["events"]) == (0, 3, 3)


def test_what_retention_took_before_it_was_audited_is_passed_over_when_told(
    engine: Engine, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits and says what to do; done to the letter, it goes on with what is left, and nothing is audited twice. (both
    engines)"""
    world = World(engine, unique)
    with Running(world.app()):
        world.publish(30)
        wait_until(world.is_done, "all events to be audited")
    world.publish(60)
    admin = KafkaAdmin(settings_for(engine))
    ends = admin.end_offsets([(world.placed.name, i) for i in range(3)])
    gone = {place: end - 5 for place, end in ends.items() if place[1] != 2}
    client = AdminClient({"bootstrap.servers": engine.bootstrap_servers})
    for future in client.delete_records([TopicPartition(*place, offset) for place, offset in gone.items()]).values():
        future.result(10)

    def advice() -> set[str]:
        return {found for found in re.findall(r"`headwater (groups reset [^`]*)`", caplog.text) if world.name in found}

    with Running(world.app()):
        wait_until(lambda: len(advice()) == 2, "what to do")
        committed = admin.committed(world.audit.name)
        wait_until(lambda: admin.committed(world.audit.name)[world.placed.name, 2].offset == ends[world.placed.name, 2],
                   "what isn't gone to be audited")  # fmt: skip
        assert all(admin.committed(world.audit.name)[place] == committed[place] for place in gone)
    for words in advice():
        servers = ["--bootstrap-servers", engine.bootstrap_servers]
        result = CliRunner().invoke(commands, [*words.split(), *servers])
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(  # even where it was not asked for
        commands,
        ["groups", "reset", world.audit.name, "--topic", world.paid.name, "--to", "earliest", "--execute", *servers],
    )
    assert result.exit_code == 0, result.output
    with Running(world.app()):
        wait_until(world.is_done, "all events to be audited")
        world.publish(10)
        wait_until(world.is_done, "all events to be audited")
    code, found = world.verify()
    assert (code, found["found"], found["spare"], found["waiting"]) == (0, [], 0, 0), found


def test_a_topic_that_was_made_anew_is_another_one(embedded: Engine, unique: str) -> None:
    """Its offsets begin again: its events are audited from the first on, and not taken for those of the old one."""
    world = World(embedded, unique)
    with Running(world.app()):
        world.publish(10)
        wait_until(world.is_done, "all events to be audited")
    admin = KafkaAdmin(settings_for(embedded))
    admin.delete_topic(world.placed.name)
    wait_until(lambda: world.placed.name not in admin.topic_names(), "the topic to go")
    admin.create_topic(world.placed.name, 3)
    world.publish(30)
    with Running(world.app()):
        wait_until(world.is_done, "all events to be audited")
    code, found = world.verify()
    assert (code, found["records"], found["events"], found["findings"]) == (0, 80, 70, 0)


def test_the_number_of_chains_stays(embedded: Engine, unique: str) -> None:
    """An audit topic of another size refuses the start, with what to do."""
    KafkaAdmin(settings_for(embedded)).create_topic(f"{unique}.trail", 3)
    world = World(embedded, unique)
    world.audit.topic.name = f"{unique}.trail"
    with pytest.raises(CannotStart, match="has 3 partitions, and 2 are declared"):
        asyncio.run(world.app().run(asyncio.Event()))


def test_what_cannot_work_is_refused(unique: str) -> None:
    """With what to change."""
    placed = Topic(unique, key="order_id", events=[Placed])
    with pytest.raises(InvalidAudit, match="of no topics"):
        Audit("a", topic="t", of=[])
    with pytest.raises(InvalidAudit, match="is of Topics, as the App has them"):
        Audit("a", topic="t", of=["orders"])  # type: ignore[list-item]
    with pytest.raises(InvalidAudit, match="the audit of itself"):
        Audit("a", topic=unique, of=[placed])
    audit = Audit("a", topic=f"{unique}-audit", of=[placed])
    app = App("x", settings=settings_for(Engine("none", "127.0.0.1:1")))
    audit.join(app)
    with pytest.raises(InvalidHandler, match="has a group a already"):
        audit.join(app)
    assert [auditor.chain_of(("orders", i), 4) for i in range(8)] == CHAINS_OF_ORDERS, "for ever"

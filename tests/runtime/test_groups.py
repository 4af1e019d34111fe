"""Groups of both protocols: rolling restarts, static members, and a whole run with everything at once."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import create_engine, select

from headwater import App, Retry, UnitOfWork
from headwater.kafka.admin import KafkaAdmin
from headwater.runtime.subscription import Subscription
from headwater.testing.history import Line, check, gather, read_lines
from tests.conftest import Engine, Evidence
from tests.kit.clients import wait_until
from tests.kit.running import Running, settings_for
from tests.runtime.test_delivery import Paid, dead_letters, effects, metadata, publish_all, topic_for


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_instances_of_both_protocols_share_and_lose_nothing(kafka: Engine, unique: str, protocol: str) -> None:
    """S002.10: KIP-848 beside the classic protocol, with the same application. (Apache Kafka: the embedded broker has no
    KIP-848 yet)"""
    topic = topic_for(unique, 6)
    seen: dict[str, list[int]] = {"one": [], "two": []}

    def make(name: str) -> App:
        app = App(unique, settings=settings_for(kafka))

        @app.handler(topic, group=unique, group_protocol=protocol)
        async def handle(event: Paid) -> None:
            seen[name].append(event.number)

        return app

    with Running(make("one")):
        publish_all(kafka, topic, [Paid(f"a{i % 30}", i) for i in range(300)])
        wait_until(lambda: len(seen["one"]) > 50, "the first instance")
        with Running(make("two")):
            publish_all(kafka, topic, [Paid(f"a{i % 30}", i) for i in range(300, 600)])
            wait_until(lambda: len(set(seen["one"]) | set(seen["two"])) == 600, "all events")
        publish_all(kafka, topic, [Paid(f"a{i % 30}", i) for i in range(600, 700)])
        wait_until(lambda: len(set(seen["one"]) | set(seen["two"])) == 700, "the rest, by the one that stayed")
    assert len(seen["one"]) + len(seen["two"]) == 700, "a clean hand-over doubles nothing"


def test_a_static_member_comes_back_to_its_partitions(engine: Engine, unique: str) -> None:
    """S004.13: group.instance.id: a restart within the session moves no partition. (both engines)"""
    topic = topic_for(unique, 4)
    assigned: list[tuple[str, int]] = []

    def make(name: str) -> App:
        settings = settings_for(engine)
        settings = replace(settings, kafka={**settings.kafka, "group.instance.id": name, "session.timeout.ms": "20000"})
        app = App(unique, settings=settings)

        @app.handler(topic, group=unique)
        async def handle(event: Paid) -> None: ...

        return app

    old = Subscription.assigned

    def note(self: Subscription, owner: object) -> None:
        assigned.append((threading.current_thread().name, owner.partition))  # type: ignore[attr-defined]
        old(self, owner)  # type: ignore[arg-type]

    Subscription.assigned = note  # type: ignore[method-assign,assignment]
    try:
        admin = KafkaAdmin(settings_for(engine))
        publish_all(engine, topic, [Paid("a", 0)])

        def shares() -> list[int]:
            return sorted(len(member.partitions) for member in admin.describe_group(unique).members)

        with Running(make("one")):
            with Running(make("two")):
                wait_until(lambda: shares() == [2, 2], "both to have two")
            before = len(assigned)
            with Running(make("two")):
                wait_until(lambda: len(assigned) >= before + 2, "the second to be back")
                time.sleep(0.5)  # long enough for a rebalance to show
                assert shares() == [2, 2]
                assert len(assigned) == before + 2, "only the one that came back was assigned anything"
    finally:
        Subscription.assigned = old  # type: ignore[method-assign]


class Restart(NamedTuple):
    """What a rolling restart did to the partitions."""

    moves: Counter[int]
    """How often each has another owner after a restart than before it."""
    assignments: int
    pause_seconds: float
    """How long partitions had no owner, summed over all."""


@pytest.mark.timeout(400)
def test_a_rolling_restart_moves_each_partition_at_most_twice(kafka: Engine, unique: str, tmp_path: Path) -> None:
    """S004.13: ten static members, restarted one after the other: each partition moves at most twice (as a rule not at
    all)."""
    found = rolling_restart(kafka, unique, "cooperative-sticky", tmp_path, is_static=True)

    assert max(found.moves.values()) <= 2
    assert found.assignments <= 2 * PARTITIONS


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_rolling_restarts_of_each_protocol(kafka: Engine, unique: str, tmp_path: Path, evidence: Evidence) -> None:
    """S004.13: static members, members without a name, and the eager protocol beside them."""
    for name, strategy in (("static", "cooperative-sticky"), ("cooperative-sticky",) * 2, ("eager", "range")):
        group = f"{unique}-{name}"
        found = rolling_restart(kafka, group, strategy, tmp_path / name, is_static=name == "static")
        row = {
            "members": name,
            "moves": sum(found.moves.values()),
            "most of a partition": max(found.moves.values()),
            "assignments": found.assignments,
            "seconds without an owner": round(found.pause_seconds, 1),
        }
        evidence.write("rolling-restart", row)
        assert name == "eager" or sum(found.moves.values()) <= 2 * PARTITIONS


PARTITIONS = 20
MEMBERS = 10
MOVER = """
    import os, sys
    from dataclasses import replace
    from headwater import App
    from headwater.runtime.lifecycle import run
    from headwater.settings import from_environment
    from tests.runtime.test_delivery import Paid, topic_for

    app = App("mover", settings=from_environment(os.environ))

    @app.handler(topic_for(sys.argv[1], 20), group=sys.argv[1], retry=None)
    async def handle(event: Paid) -> None: ...

    run(app)
"""


def rolling_restart(engine: Engine, name: str, strategy: str, history: Path, *, is_static: bool = False) -> Restart:
    environment = {
        **os.environ,
        "HEADWATER_BOOTSTRAP_SERVERS": engine.bootstrap_servers,
        "HEADWATER_KAFKA_PARTITION_ASSIGNMENT_STRATEGY": strategy,
        "HEADWATER_KAFKA_HEARTBEAT_INTERVAL_MS": "200",
        "HEADWATER_HISTORY": str(history),
    }
    admin = KafkaAdmin(settings_for(engine))
    admin.create_topic(name, PARTITIONS)

    def start(index: int) -> "subprocess.Popen[bytes]":
        named = {"HEADWATER_KAFKA_CLIENT_ID": f"member-{index}"}
        if is_static:
            named["HEADWATER_KAFKA_GROUP_INSTANCE_ID"] = f"member-{index}"
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(MOVER), name], env={**environment, **named})

    def owners() -> dict[int, str]:
        members = admin.describe_group(name).members
        return {partition: member.client_id for member in members for _, partition in member.partitions}

    def is_balanced() -> bool:
        if name not in admin.group_states():
            return False
        described = admin.describe_group(name)
        return (
            described.state == "STABLE"
            and len(described.members) == MEMBERS
            and all(len(member.partitions) == 2 for member in described.members)
        )

    def is_back(index: int) -> bool:
        """Balanced, and with the new process."""
        begun = [line for line in read_lines(str(history), name) if line.event == "assign"]
        mine = [line for line in begun if line.at_ms > restarted_ms]
        return is_balanced() and bool(mine)

    restarted_ms = 0.0
    processes = [start(index) for index in range(MEMBERS)]
    moves: Counter[int] = Counter(dict.fromkeys(range(PARTITIONS), 0))
    try:
        wait_until(is_balanced, "ten members", 90)
        begun_ms = time.time() * 1000
        before = owners()
        for index in range(MEMBERS):
            processes[index].send_signal(signal.SIGTERM)
            processes[index].wait(30)
            restarted_ms = time.time() * 1000
            processes[index] = start(index)
            wait_until(lambda index=index: is_back(index), f"the restart of {index}", 90)  # type: ignore[misc]
            after = owners()
            moves.update(partition for partition in after if after[partition] != before[partition])
            before = after
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)
    return Restart(moves, *without_owner([line for line in read_lines(str(history), name) if line.at_ms > begun_ms]))


def without_owner(lines: list[Line]) -> tuple[int, float]:
    """How many assignments there were, and for how many seconds partitions had no owner."""
    assignments, pause_ms = 0, 0
    revoked: dict[int, int] = {}
    for line in lines:
        if line.event == "revoke":
            revoked[line.partition] = line.at_ms
        elif line.event == "assign":
            assignments += 1
            pause_ms += line.at_ms - revoked.pop(line.partition, line.at_ms)
    return assignments, pause_ms / 1000


@pytest.mark.timeout(300)
def test_ten_thousand_events_with_failures_two_instances_and_a_rolling_restart(
    engine: Engine, postgres: object, unique: str, tmp_path: Path
) -> None:
    """S001.16, S001.25, S000.9: 1,000 keys, 1 % failing for a while, 0.1 % poison: every key in order, dead letters are
    the poison, effects exactly once. (both engines)"""
    url = f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres"  # type: ignore[attr-defined]
    table = effects.to_metadata(type(metadata)(), name=f"effects_{unique}")
    database = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    table.metadata.create_all(database)
    topic = topic_for(unique, 6)
    chance = random.Random(1)
    flaky = {number: 1 + chance.randrange(5) for number in range(10_000) if chance.random() < 0.01}
    poison = {number for number in range(10_000) if chance.random() < 0.001}
    lock = threading.Lock()

    def make() -> App:
        settings = replace(settings_for(engine, url), history=str(tmp_path / "history"))
        app = App(unique, settings=settings)
        options = {"delivery": "effectively_once", "retry": Retry(20, "100ms..500ms"), "poison": [ZeroDivisionError]}

        @app.handler(topic, group=unique, concurrency=16, **options)
        async def handle(event: Paid, uow: UnitOfWork) -> None:
            if event.number in poison:
                raise ZeroDivisionError
            with lock:
                if flaky.get(event.number, 0) > 0:
                    flaky[event.number] -= 1
                    raise RuntimeError("for a while")
            await uow.async_session.execute(table.insert().values(account=event.account, number=event.number))

        return app

    admin = KafkaAdmin(settings_for(engine))
    publish_all(engine, topic, [Paid(f"a{i % 1000}", i) for i in range(10_000)])
    instances = [Running(make()), Running(make())]
    for instance in instances:
        instance.__enter__()
    for index in (0, 1):
        handled = 3000 * (index + 1)
        wait_until(lambda n=handled: sum(p.offset for p in admin.committed(unique).values()) > n, "a part of them", 60)  # type: ignore[misc]
        instances[index].stop()
        instances[index] = Running(make())
        instances[index].__enter__()
    try:
        wait_until(lambda: sum(p.offset for p in admin.committed(unique).values()) == 10_000, "the end", 200)
        wait_until(
            lambda: not any(gather(settings_for(engine), str(tmp_path / "history"), unique, unique).outstanding.values()),
            "the parked ones", 60,
        )  # fmt: skip
    finally:
        for instance in instances:
            instance.stop()
    with database.connect() as connection:
        rows = connection.execute(select(table.c.account, table.c.number).order_by(table.c.serial)).all()
    table.metadata.drop_all(database)
    database.dispose()
    report = check(gather(settings_for(engine), str(tmp_path / "history"), unique, unique), complete=True)

    assert not report.violations, report.violations[0]
    assert sorted(number for _, number in rows) == sorted(set(range(10_000)) - poison)
    by_key: dict[str, list[int]] = defaultdict(list)
    for account, number in rows:
        by_key[account].append(number)
    assert all(numbers == sorted(numbers) for numbers in by_key.values())
    letters = dead_letters(engine, unique, unique, len(poison))
    assert len({(letter.partition, letter.source.offset) for letter in letters}) == len(poison)


def test_a_slow_handler_keeps_memory_bounded_and_its_group(engine: Engine, unique: str) -> None:
    """S004.2: back-pressure: what is taken and not handled is bounded, and the member stays in its group."""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(engine))
    go_on = threading.Event()
    subscriptions: list[Subscription] = []
    old = Subscription.start

    def note(self: Subscription) -> None:
        subscriptions.append(self)
        old(self)

    @app.handler(topic, group=unique, concurrency=10)
    async def handle(event: Paid) -> None:
        while not go_on.is_set():
            await asyncio.sleep(0.05)

    publish_all(engine, topic, [Paid(f"a{i}", i) for i in range(5000)])
    admin = KafkaAdmin(settings_for(engine))
    Subscription.start = note  # type: ignore[method-assign]
    try:
        with Running(app):
            wait_until(lambda: bool(subscriptions and subscriptions[0]._owners), "the assignment")
            (owner,) = subscriptions[0]._owners.values()
            wait_until(lambda: owner.taken >= 1000, "a full buffer")
            time.sleep(2)  # time in which it would go on taking
            assert owner.taken - owner.done <= 2000
            assert len(admin.describe_group(unique).members) == 1
            go_on.set()
            wait_until(
                lambda: (p := admin.committed(unique).get((unique, 0))) is not None and p.offset == 5000, "the end", 60
            )
    finally:
        Subscription.start = old  # type: ignore[method-assign]

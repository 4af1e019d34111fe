"""The failure contract under faults at every crash point, with work in flight: C1 to C8 hold, on both engines.

Two instances of the application work; whichever comes to a crash point first is struck there, again and again, at one
point after the other, while events come in. In the end everything is drained, and the checker looks at the histories of
all processes.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Producer

from headwater.event.codec import encode
from headwater.event.envelope import Cause
from headwater.kafka.admin import KafkaAdmin
from headwater.runtime import crash_point
from headwater.settings import Settings
from headwater.testing.broker import BrokerProcess
from headwater.testing.history import check, gather
from tests.conftest import TEST_SETTINGS, Evidence
from tests.faults.application import EFFECTS, Moved
from tests.kit.clients import wait_until
from tests.kit.kafka import KafkaCluster
from tests.kit.postgres import Postgres

FAULTS = ("kill", "stop", "rebalance", "broker", "too-large")
HITS = int(os.environ.get("HEADWATER_TEST_HITS", "1"))
SESSION_MS = 1500
KEYS = 60
PER_SECOND = 150
HIT_SECONDS = 90.0
DRAIN_SECONDS = 300.0


class Engine:
    """A broker of the test's own, which can be killed."""

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self._home = home
        self._broker: BrokerProcess | None = None
        self._cluster: KafkaCluster | None = None
        self._killed = 0
        if name == "embedded":
            self._broker = BrokerProcess.start(home / "data", TEST_SETTINGS)
            self.servers = self._broker.bootstrap_servers
        else:
            self._cluster = KafkaCluster(nodes=3 if name == "kafka3" else 1).start()
            self.servers = self._cluster.bootstrap_servers

    def kill_and_restart(self) -> None:
        if self._broker is not None:
            self._broker.kill()
            self._broker = BrokerProcess.start(self._home / "data", TEST_SETTINGS, listen=self.servers)
        else:
            assert self._cluster is not None
            node = self._cluster.nodes[self._killed % len(self._cluster.nodes)]
            self._killed += 1
            self._cluster.kill_node(node)
            self._cluster.start_node(node)
            self._cluster.wait_ready()

    def stop(self) -> None:
        if self._broker is not None:
            self._broker.stop()
        if self._cluster is not None:
            self._cluster.stop()


class Instance:
    """A process of the application."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.application", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env={**os.environ, **environment}, text=True,
        )  # fmt: skip
        self.hits: list[str] = []
        self._serial = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            words = line.split()
            if words[:1] == ["hit"] and words[2] == str(self._serial):
                self.hits.append(words[1])

    def arm(self, point: str, fault: str, count: int) -> None:
        """From now on its hits are those of this one: what it says of an earlier one may come late."""
        assert self.process.stdin is not None
        self._serial += 1
        self.hits.clear()
        self.process.stdin.write(f"arm {point} {fault} {count} {self._serial}\n")
        self.process.stdin.flush()

    def disarm(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.write(f"arm nowhere none 0 {self._serial}\n")
            self.process.stdin.flush()

    def is_stopped(self) -> bool:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


class Traffic:
    """Events of many keys, all the time."""

    def __init__(self, servers: str, topic: str) -> None:
        self._producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True, "linger.ms": 5,
                                   "reconnect.backoff.max.ms": 300, "message.timeout.ms": 120_000})  # fmt: skip
        self._topic = topic
        self._stop = threading.Event()
        self.sent = 0
        self.failed: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self._producer.flush(60) == 0
        assert not self.failed, self.failed[:3]

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            for _ in range(PER_SECOND // 50):
                event = Moved(f"k{self.sent % KEYS}", self.sent)
                encoded = encode(event, "traffic", Cause("c", None))
                self._producer.produce(
                    self._topic, encoded.value, event.account, headers=encoded.headers, on_delivery=self._told
                )
                self.sent += 1
            self._producer.poll(0)

    def _told(self, error: object, message: object) -> None:
        if error is not None:
            self.failed.append(str(error))


@contextlib.contextmanager
def database(server: Postgres, name: str) -> Iterator[str]:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = f"postgresql://postgres@127.0.0.1:{server.port}/{name}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            f"CREATE TABLE {EFFECTS} (serial bigserial PRIMARY KEY, event_id text, key text, number int)"
        )
    yield url


class Scenario:
    """One fault, at one crash point after the other."""

    def __init__(
        self, engine: Engine, url: str, home: Path, fault: str, seed: int, delivery: str, points: Sequence[str]
    ) -> None:
        self.points = points
        self.engine = engine
        self.fault = fault
        self.chance = random.Random(seed)
        self.home = home
        self.group = f"g-{fault}"
        self.topic = f"moves-{fault}"
        self.delivery = delivery
        self.settings = Settings(engine.servers, kafka={"session.timeout.ms": str(SESSION_MS)})
        self.admin = KafkaAdmin(self.settings)
        self.hits: Counter[str] = Counter()
        self.environment = {
            "HEADWATER_BOOTSTRAP_SERVERS": engine.servers,
            "HEADWATER_DATABASE_URL": url,
            "HEADWATER_HISTORY": str(home / "history"),
            "HEADWATER_KAFKA_SESSION_TIMEOUT_MS": str(SESSION_MS),
            "HEADWATER_KAFKA_RECONNECT_BACKOFF_MAX_MS": "300",
            "HEADWATER_KAFKA_METADATA_MAX_AGE_MS": "2000",
        }

    def start(self) -> Instance:
        return Instance([self.group, self.topic, self.delivery], self.environment, self.home / "log")

    def run(self, hits: int) -> None:
        instances = [self.start(), self.start()]
        try:
            wait_until(lambda: self.topic in self.admin.topic_names(), "the topic", 60)
            with Traffic(self.engine.servers, self.topic) as traffic:
                for _ in range(hits):
                    for point in self.points:
                        instances = self.strike(self.awake(instances), point)
            instances = self.awake(instances)
            self.drain(traffic.sent)
            # What a zombie parked late is looked at by the next owner: there is one now.
            for instance in instances:
                instance.end()
            instances = [self.start(), self.start()]
            self.wait_nothing_parked()
        finally:
            for instance in instances:
                if instance.process.poll() is None and instance.is_stopped():
                    instance.process.kill()
                instance.end()

    def awake(self, instances: list[Instance]) -> list[Instance]:
        """Those that came to the last point a moment after the one that was struck there are in its state."""
        found = []
        for instance in instances:
            if instance.process.poll() is not None:
                instance.end()
                found.append(self.start())
                continue
            if instance.is_stopped():
                os.kill(instance.process.pid, signal.SIGCONT)
            found.append(instance)
        return found

    def strike(self, instances: list[Instance], point: str) -> list[Instance]:
        """Once at this point, whichever instance comes there first; with the instances that go on."""
        for instance in instances:
            instance.arm(point, self.fault, self.chance.randrange(1, 4))
        wait_until(lambda: any(instance.hits for instance in instances), f"{point} to be reached", HIT_SECONDS)
        for instance in instances:
            if not instance.hits:
                instance.disarm()
        time.sleep(0.02)  # for the one that was on its way there
        struck = [instance for instance in instances if instance.hits]
        self.hits[point] += 1
        if self.fault == "kill":
            for instance in struck:
                instance.process.wait(10)
                instance.end()
            return [self.start() if instance in struck else instance for instance in instances]
        if self.fault == "stop":
            wait_until(lambda: all(instance.is_stopped() for instance in struck), "the stop")
            time.sleep(3 * SESSION_MS / 1000)  # three sessions: it is a zombie when it wakes
            for instance in struck:
                os.kill(instance.process.pid, signal.SIGCONT)
        elif self.fault == "rebalance":
            third = self.start()
            wait_until(lambda: self._has_members(3), "a third member", 60)
            third.end()
        elif self.fault == "broker":
            self.engine.kill_and_restart()
        elif self.fault == "too-large":
            name = f"{self.topic}.{self.group}.retry"
            self.admin.alter_topic_configs(name, {"max.message.bytes": "100"})
            time.sleep(0.3)
            self.admin.alter_topic_configs(name, {"max.message.bytes": "2000000"})
        return instances

    def _has_members(self, count: int) -> bool:
        members = self.admin.describe_group(self.group).members
        return sum(1 for member in members if member.partitions) >= count

    def drain(self, sent: int) -> None:
        """Until the group has come to the end."""

        def is_through() -> bool:
            return sum(position.offset for position in self.admin.committed(self.group).values()) >= sent

        wait_until(is_through, f"{self.group} to come to the end", DRAIN_SECONDS)

    def wait_nothing_parked(self) -> None:
        def nothing_parked() -> bool:
            evidence = gather(self.settings, str(self.home / "history"), self.group, self.topic)
            return not any(evidence.outstanding.values())

        wait_until(nothing_parked, "the parked ones", DRAIN_SECONDS)


def strike_everywhere(
    engine: Engine,
    postgres: Postgres,
    fault: str,
    seed: int,
    hits: int,
    points: Sequence[str],
    delivery: str = "effectively_once",
) -> dict[str, object]:
    """Counts. Fails on the first violation, with the seed."""
    home = Path(tempfile.mkdtemp(prefix="headwater-faults-"))
    name = f"f{fault.replace('-', '_')}_{engine.name}_{time.time_ns()}"
    with database(postgres, name) as url:
        scenario = Scenario(engine, url, home, fault, seed, delivery, points)
        scenario.run(hits)
        effects = (url, EFFECTS) if delivery == "effectively_once" else None
        evidence = gather(scenario.settings, str(home / "history"), scenario.group, scenario.topic, effects)
    report = check(evidence, complete=True)
    assert not report.violations, (
        f"seed {seed}, {fault} on {engine.name}: {len(report.violations)} violations, first: {report.violations[0]}; "
        f"histories in {home / 'history'}"
    )
    poison = sum(1 for events in evidence.source.values() for event in events.values() if is_poison(event.value or b""))
    letters = {(letter.partition, letter.source.offset) for letter in evidence.letters}
    assert len(letters) == poison, f"seed {seed}: {len(letters)} dead letters, {poison} poison"
    if effects is not None:
        assert report.counts["effects"] == report.counts["source"] - poison
    assert min(scenario.hits[point] for point in points) >= hits
    return {
        "engine": engine.name, "fault": fault, "seed": seed, "hits": sum(scenario.hits.values()),
        "least per point": min(scenario.hits.values()), "events": report.counts["source"], "ok": report.counts["ok"],
        "parked": report.counts["park"], "dead": len(letters), "processes": report.counts["processes"], "violations": 0,
    }  # fmt: skip


def is_poison(value: bytes) -> bool:
    from tests.faults.application import POISON_EVERY

    number = int(value.split(b'"number":')[1].split(b"}")[0])
    return number % POISON_EVERY == POISON_EVERY - 1


def points_of(fault: str) -> Sequence[str]:
    """Two of the ten crash points, others for each fault; the soak has all of them."""
    first = 2 * FAULTS.index(fault)
    return crash_point.NAMES[first : first + 2]


@pytest.fixture(params=["embedded", "kafka"])
def own_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(request.param, tmp_path)
    yield engine
    engine.stop()


@pytest.mark.server
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_crash_point_breaks_no_promise(own_engine: Engine, postgres: Postgres, fault: str) -> None:
    """S001.16, S000.9, S004.8: C1 to C8 with work in flight, at two crash points each, together all ten: kill -9, a zombie, a
    rebalance, a broker killed, a record that the retry topic doesn't take. (both engines)"""
    strike_everywhere(own_engine, postgres, fault, seed=1, hits=HITS, points=points_of(fault))


@pytest.mark.server
@pytest.mark.timeout(900)
def test_three_nodes_of_which_one_is_killed_break_no_promise(postgres: Postgres, tmp_path: Path) -> None:
    """S002.24, S000.10: the same program on three Kafka nodes, one of them killed at each crash point, another each time."""
    engine = Engine("kafka3", tmp_path)
    try:
        strike_everywhere(engine, postgres, "broker", seed=1, hits=HITS, points=points_of("broker"))
    finally:
        engine.stop()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("engine_name", ["embedded", "kafka", "kafka3"])
def test_ten_hits_of_each_crash_point(
    engine_name: str, postgres: Postgres, fault: str, tmp_path: Path, evidence: Evidence
) -> None:
    """S001.16: ten hits of each crash point by each fault."""
    engine = Engine(engine_name, tmp_path)
    try:
        evidence.write(
            "failure-contract",
            strike_everywhere(engine, postgres, fault, seed=int(time.time()), hits=10, points=crash_point.NAMES),
        )
    finally:
        engine.stop()

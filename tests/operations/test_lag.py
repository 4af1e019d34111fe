"""Lag on both engines: records, seconds, verdicts, alarms, and what Prometheus reads."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka import TopicPartition as Partition
from typer.testing import CliRunner

from headwater.kafka.admin import KafkaAdmin
from headwater.operations.lag import WINDOW, GroupLag, LagWatch
from headwater.operations.verdict import Verdict
from headwater.testing.broker import BrokerProcess
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.commands import commands
from tests.kit.running import settings_for

pytestmark = pytest.mark.server


class World:
    """A topic of one partition and groups of it, looked at every ten seconds of a clock of its own."""

    def __init__(self, engine: Engine, name: str, partitions: int = 1) -> None:
        self.engine, self.topic = engine, name
        self.admin = KafkaAdmin(settings_for(engine))
        self.admin.create_topic(name, partitions)
        self.producer = Producer({"bootstrap.servers": engine.bootstrap_servers})
        self.now_ms = int(time.time() * 1000)

    def produce(self, count: int, *, seconds_ago: int = 0, partition: int = 0) -> None:
        for _ in range(count):
            at = self.now_ms - seconds_ago * 1000
            self.producer.produce(self.topic, b"x", partition=partition, timestamp=at)
        assert self.producer.flush(30) == 0

    def commit(self, group: str, offset: int, partition: int = 0) -> None:
        self.admin.alter_committed(group, {(self.topic, partition): (offset, "")})

    def watch(self, *groups: str, allowed_lag: int = 0) -> LagWatch:
        return LagWatch(settings_for(self.engine), groups=groups, allowed_lag=allowed_lag, now_ms=lambda: self.now_ms)

    def look(self, looks: LagWatch) -> dict[str, GroupLag]:
        self.now_ms += 10_000
        return {each.group: each for each in looks.look()}


@pytest.fixture
def world(engine: Engine, unique: str) -> World:
    return World(engine, unique)


def test_lag_is_told_in_records_and_in_seconds(world: World, unique: str) -> None:
    """S000.17: seconds are those since the next record was written; without lag they are none. Two groups at different places of
    one partition, and a hole before the next record. (both engines)"""
    world.produce(5, seconds_ago=600)
    world.produce(5, seconds_ago=60)
    world.produce(1, seconds_ago=5, partition=0)
    first, second, done = f"{unique}-1", f"{unique}-2", f"{unique}-3"
    world.commit(first, 2)
    world.commit(second, 7)
    world.commit(done, 11)
    looks = world.watch(first, second, done)
    try:
        found = world.look(looks)
    finally:
        looks.close()
    assert {name: (each.lag, each.seconds) for name, each in found.items()} == {
        first: (9, 610.0), second: (4, 70.0), done: (0, 0.0),
    }  # fmt: skip
    assert {each.verdict for each in found.values()} == {None}


def test_a_group_that_stops_alarms_and_recovers(world: World, unique: str) -> None:
    """S000.17, S004.12: STOP when nobody commits any more, WARN while it falls behind, OK when it catches up; a verdict needs a
    whole window. (both engines)"""
    stopped, slow, well = f"{unique}-stopped", f"{unique}-slow", f"{unique}-well"
    world.produce(5)
    for group in (stopped, slow, well):
        world.commit(group, 1)
    looks = world.watch(stopped, slow, well)
    try:
        verdicts: dict[str, list[Verdict | None]] = {stopped: [], slow: [], well: []}
        for turn in range(WINDOW):
            world.produce(5)
            world.commit(slow, 2 + turn)
            world.commit(well, 10 + 5 * turn)
            for name, each in world.look(looks).items():
                verdicts[name].append(each.verdict)
        assert {name: each[-1] for name, each in verdicts.items()} == {
            stopped: Verdict.ERR, slow: Verdict.WARN, well: Verdict.OK,
        }  # fmt: skip
        assert {verdict for each in verdicts.values() for verdict in each[:-1]} == {None}
        (partition,) = world.look(looks)[stopped].partitions
        assert partition.verdict is Verdict.STOP
        world.commit(stopped, 55)
        assert world.look(looks)[stopped].verdict is Verdict.OK
        world.commit(slow, 3)
        rewound = world.look(looks)[slow]
        assert (rewound.verdict, rewound.partitions[0].verdict) == (Verdict.ERR, Verdict.REWIND)
    finally:
        looks.close()


def test_a_member_that_does_not_advance_stalls(engine: Engine, unique: str) -> None:
    """S000.17: it is there and has the partition; who has none is told, too. (both engines)"""
    world = World(engine, unique, partitions=2)
    world.produce(3)
    consumer = Consumer(
        {"bootstrap.servers": engine.bootstrap_servers, "group.id": unique, "client.id": "slow-one",
         "enable.auto.commit": False, "auto.offset.reset": "earliest"}
    )  # fmt: skip
    consumer.subscribe([unique])
    wait_until(lambda: consumer.poll(0.1) is not None or len(consumer.assignment()) == 2, "its partitions", 60)
    consumer.commit(offsets=[Partition(unique, 0, 1)], asynchronous=False)
    looks = world.watch(unique, allowed_lag=0)
    try:
        for _ in range(WINDOW):
            found = world.look(looks)[unique]
            consumer.poll(0)
    finally:
        looks.close()
        consumer.close()
    assert (found.state, found.members, found.without_member, found.verdict) == ("stable", 1, 0, Verdict.ERR)
    assert [(each.partition, each.lag, each.verdict, each.client_id) for each in found.partitions] == [
        (0, 2, Verdict.STALL, "slow-one"), (1, 0, Verdict.OK, "slow-one"),
    ]  # fmt: skip


def test_a_topic_that_is_gone_is_not_waited_for(world: World, unique: str) -> None:
    """Its group remembers it, and nothing else does. (both engines)"""
    world.produce(3)
    world.commit(f"{unique}-g", 1)
    world.admin.delete_topic(unique)
    wait_until(lambda: unique not in world.admin.topic_names(), "the topic to go")
    looks = world.watch(f"{unique}-g")
    try:
        assert [(each.lag, each.partitions) for each in world.look(looks).values()] in ([], [(0, [])])
    finally:
        looks.close()


# The command


LABELS = {
    "kafka_partition_latest_offset": "cluster_name topic partition",
    "kafka_partition_earliest_offset": "cluster_name topic partition",
    "kafka_consumergroup_group_offset": "cluster_name group topic partition member_host consumer_id client_id",
    "kafka_consumergroup_group_lag": "cluster_name group topic partition member_host consumer_id client_id",
    "kafka_consumergroup_group_lag_seconds": "cluster_name group topic partition member_host consumer_id client_id",
    "kafka_consumergroup_group_max_lag": "cluster_name group",
    "kafka_consumergroup_group_max_lag_seconds": "cluster_name group",
    "kafka_consumergroup_group_sum_lag": "cluster_name group",
    "kafka_consumergroup_group_topic_sum_lag": "cluster_name group topic",
    "kafka_consumergroup_poll_time_ms": "cluster_name",
    "burrow_kafka_consumer_status": "cluster consumer_group",
    "burrow_kafka_consumer_lag_total": "cluster consumer_group",
    "burrow_kafka_consumer_current_offset": "cluster consumer_group topic partition",
    "burrow_kafka_consumer_partition_lag": "cluster consumer_group topic partition",
    "burrow_kafka_topic_partition_status": "cluster consumer_group topic partition",
    "burrow_kafka_topic_partition_offset": "cluster topic partition",
    "kafka_topic_partition_replicas": "topic partition",
    "kafka_topic_partition_in_sync_replica": "topic partition",
    "kafka_topic_partition_under_replicated_partition": "topic partition",
}
"""As kafka-lag-exporter (Metrics.scala), Burrow (httpserver/prometheus.go) and kafka_exporter have them."""


@pytest.fixture
def told() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A webhook, and what it was told."""
    alerts: list[dict[str, str]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            alerts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    hook = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{hook.server_port}/", alerts
    hook.shutdown()
    hook.server_close()


def scrape(url: str) -> dict[str, dict[str, float]]:
    """Values by name and labels."""
    found: dict[str, dict[str, float]] = {}
    with urllib.request.urlopen(url, timeout=5) as answer:
        for line in answer.read().decode().splitlines():
            if not line.startswith("#"):
                name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
                found.setdefault(name, {})[labels] = float(value)
    return found


def test_prometheus_reads_it_and_a_webhook_is_told(
    world: World, unique: str, told: tuple[str, list[dict[str, str]]]
) -> None:
    """S000.17, S004.12, S002.26: names and labels are those that dashboards know, the figures move; a group that nobody commits
    for alarms once, and once when it is over. (both engines)"""
    webhook, alerts = told
    group = f"{unique}-g"
    world.produce(4)
    world.commit(group, 1)
    command = [sys.executable, "-m", "headwater", "lag", "--group", group, "--metrics", "127.0.0.1:0", "--every", "300ms",
               "--cluster", "here", "--bootstrap-servers", world.engine.bootstrap_servers]  # fmt: skip
    environment = {**os.environ, "HEADWATER_ALERT_WEBHOOK": webhook}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = process.stderr.readline().split()[1]
        status, lag = "burrow_kafka_consumer_status", "kafka_consumergroup_group_sum_lag"
        wait_until(lambda: scrape(url).get(status) is not None, "a verdict", 60)
        found = scrape(url)
        assert found[status] == {f'cluster="here",consumer_group="{group}"': 3}
        assert found[lag] == {f'cluster_name="here",group="{group}"': 3}
        labels = {name: set(re.findall(r"(\w+)=", next(iter(each)))) for name, each in found.items()}
        assert labels == {name: set(each.split()) for name, each in LABELS.items()}
        wait_until(lambda: len(alerts) == 1, "the alarm")
        world.produce(2)
        wait_until(lambda: list(scrape(url)[lag].values()) == [5], "new records to count")
        world.commit(group, 6)
        wait_until(lambda: len(alerts) == 2, "the recovery")
        assert list(scrape(url)[lag].values()) == [0]
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    assert [(each["alert"], each["state"], each["group"]) for each in alerts] == [
        ("lag", "raised", group), ("lag", "recovered", group),
    ]  # fmt: skip
    assert "STOP: 3 behind" in alerts[0]["detail"]
    assert f"{group} ERR" in printed
    assert printed.rstrip().endswith(f"{group} OK: lag 0")


def test_a_cluster_that_goes_leaves_no_stale_figures(broker: BrokerProcess, unique: str, tmp_path: Path) -> None:
    """While it is away nothing is told instead of what was, and that once; it is told again when it is back."""
    settings = settings_for(Engine("embedded", broker.bootstrap_servers))
    admin = KafkaAdmin(settings)
    admin.create_topic(unique, 1)
    admin.alter_committed("g", {(unique, 0): (0, "")})
    command = [sys.executable, "-m", "headwater", "lag", "--metrics", "127.0.0.1:0", "--every", "200ms",
               "--bootstrap-servers", broker.bootstrap_servers]  # fmt: skip
    said = tmp_path / "stderr"
    with said.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        wait_until(lambda: said.read_text().endswith("/metrics\n"), "its address")
        url = said.read_text().split()[1]
        lag = "kafka_consumergroup_group_sum_lag"
        wait_until(lambda: lag in scrape(url), "figures")
        broker.kill()
        wait_until(lambda: lag not in scrape(url), "them to go", 60)
        with BrokerProcess.start(broker.data, listen=broker.bootstrap_servers):
            wait_until(lambda: lag in scrape(url), "them to be there again", 60)
    finally:
        process.kill()
        process.wait()
    assert said.read_text().count("headwater lag: ") <= 2, said.read_text()


def test_the_command_tells_once_and_explains_itself(world: World, unique: str) -> None:
    """A table that fits, JSON, and errors that say what to do. (both engines)"""
    group = f"{unique}-g"
    world.produce(4, seconds_ago=90)
    world.commit(group, 1)
    servers = ["--bootstrap-servers", world.engine.bootstrap_servers]

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(commands, ["lag", *arguments, *servers])
        return result.exit_code, result.stdout or result.stderr

    code, printed = run("--group", group, "--json")
    (found,) = json.loads(printed)
    assert (code, found["group"], found["lag"], found["verdict"]) == (0, group, 3, None)
    assert 90 <= found["seconds"] < 600
    code, printed = run("--group", group)
    assert code == 0
    assert re.search(rf"{group}\s+empty\s+0\s+1\s+3\s+\d+ s", printed)
    for arguments, words in (
        (("--group", "nobody"), "there is no group nobody"),
        (("--every", "soon", "--watch"), "'soon' is no duration"),
        (("--metrics", "9308"), "--metrics takes HOST:PORT"),
    ):
        code, said = run(*arguments)
        assert code == 1
        assert words in said.replace("\n", " ")

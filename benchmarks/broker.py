"""The broker beside Apache Kafka: small requests, bulk, delivery, fsync, start, memory, real clients."""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from benchmarks.frames import fetch, produce
from benchmarks.servers import NO_SYNC, SYNC, Headwater, Kafka, Server, build_load_generator
from benchmarks.table import Table

SECONDS = 2.0
BULK_SECONDS = 0.6
ROUNDS = 3
GIGABYTE = 1_000_000_000


class Bench:
    def __init__(self) -> None:
        self.load = build_load_generator()
        self.folder = Path(tempfile.mkdtemp(prefix="headwater-frames-"))
        self.topics = 0

    def frame(self, content: bytes) -> str:
        self.topics += 1
        path = self.folder / f"{self.topics}"
        path.write_bytes(content)
        return str(path)

    def topic(self, server: Server, partitions: int = 1) -> str:
        self.topics += 1
        name = f"bench-{self.topics}"
        admin = AdminClient({"bootstrap.servers": server.address})
        admin.create_topics([NewTopic(name, partitions)])[name].result(20)
        return name

    def closed(self, server: Server, frame: str, connections: int, seconds: float = SECONDS) -> dict[str, float]:
        host, _, port = server.address.rpartition(":")
        command = [str(self.load), "closed", frame, host, port, str(connections), str(seconds)]
        found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        found["rate"] = found["count"] / found["seconds"]
        return found

    def warm(self, size: int = 2 * GIGABYTE) -> None:
        """Page cache that was used just now is several times as fast as what lay idle: the same for both brokers."""
        path = self.folder / "warm"
        block = bytes(1 << 20)
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(block)
        path.unlink()

    def small(self, server: Server, connections: int) -> dict[str, float]:
        name = self.topic(server)
        return self.closed(server, self.frame(produce(name, 100, 1)), connections)

    def bulk(self, server: Server, record_bytes: int, records: int, connections: int) -> float:
        name = self.topic(server)
        frame = produce(name, record_bytes, records)
        self.warm()  # as much as the load writes at most: beyond it the memory is measured, not the broker
        return self.closed(server, self.frame(frame), connections, BULK_SECONDS)["rate"] * len(frame) / 1e6

    def fetches(self, server: Server) -> float:
        name = self.topic(server)
        self.closed(server, self.frame(produce(name, 1000, 1000)), 1, 0.5)
        frame, _ = fetch(name, 0, 1 << 20)
        found = self.closed(server, self.frame(frame), 1)
        return found["bytes_in"] / found["seconds"] / 1e6

    def delivery(self, server: Server) -> dict[str, float]:
        name = self.topic(server)
        frame, at = fetch(name, 0, 1 << 20, 5000)
        host, _, port = server.address.rpartition(":")
        command = [str(self.load), "delivery", self.frame(produce(name, 100, 1)), self.frame(frame)]
        command += [str(at), host, port, "1500", "0"]
        found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return found

    def small_beside_bulk(self, server: Server) -> dict[str, float]:
        host, _, port = server.address.rpartition(":")
        bulk = self.frame(produce(self.topic(server), 1000, 1000))
        command = [str(self.load), "closed", bulk, host, port, "1", str(SECONDS + 0.6)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as beside:
            time.sleep(0.3)
            found = self.small(server, 10)
            beside.wait()
        return found

    def client(self, server: Server, record_bytes: int, count: int) -> tuple[float, float]:
        """(records/s, broker's CPU seconds per million) of confluent-kafka, 6 partitions, acks=all."""
        name = self.topic(server, 6)
        producer = Producer(
            {"bootstrap.servers": server.address, "acks": "all", "linger.ms": 5, "queue.buffering.max.messages": 2_000_000,
             "queue.buffering.max.kbytes": 2_000_000}
        )  # fmt: skip
        value = bytes(record_bytes)
        cpu, started = server.cpu_seconds(), time.perf_counter()
        for i in range(count):
            producer.produce(name, value, partition=i % 6)
        assert producer.flush(120) == 0
        seconds = time.perf_counter() - started
        return count / seconds, (server.cpu_seconds() - cpu) / count * 1e6

    def consume(self, server: Server, count: int = 500_000) -> float:
        name = self.topic(server, 6)
        producer = Producer(
            {"bootstrap.servers": server.address, "linger.ms": 5, "queue.buffering.max.messages": 2_000_000}
        )
        for i in range(count):
            producer.produce(name, bytes(100), partition=i % 6)
        producer.flush(60)
        consumer = Consumer({"bootstrap.servers": server.address, "group.id": "x", "fetch.queue.backoff.ms": 5})
        consumer.assign([TopicPartition(name, index, 0) for index in range(6)])
        found, started = 0, time.perf_counter()
        while found < count:
            found += len(consumer.consume(5000, 1.0))
        rate = count / (time.perf_counter() - started)
        consumer.close()
        return rate


def run() -> None:
    bench = Bench()
    table = Table("Broker beside Apache Kafka 4.3.1", ("kafka", "headwater", "headwater default"))
    kafka, plain, default = Kafka("kafka", {}), Headwater("headwater", NO_SYNC), Headwater("headwater default", {})
    servers: list[Server] = [kafka, plain, default]
    try:
        time.sleep(3)
        idle(table, servers)
        for server in servers:  # one discarded run warms each
            bench.small(server, 10)
            bench.bulk(server, 1000, 1000, 1)
        compare(
            table,
            servers,
            "1 x 100 B, acks=all, 1 connection, p50",
            "us",
            lambda s: bench.small(s, 1)["p50_us"],
            "0.85",
        )
        for connections, aim in ((10, "1.3"), (100, "0.9")):
            compare(
                table, servers, f"the same, {connections} connections", "req/s",
                lambda s, n=connections: bench.small(s, n)["rate"], aim,  # type: ignore[misc]
            )  # fmt: skip
        compare(table, servers, "1 MB batches in", "MB/s", lambda s: bench.bulk(s, 1000, 1000, 1), "3")
        compare(table, servers, "16 KB batches, 10 connections", "MB/s", lambda s: bench.bulk(s, 1000, 16, 10), "1")
        compare(table, servers, "1 MB fetches out", "MB/s", bench.fetches, "0.9")
        deliveries = {server.name: [bench.delivery(server) for _ in range(ROUNDS)] for server in servers}
        for name in ("p50", "p99"):
            values = {key: [each[f"{name}_us"] for each in found] for key, found in deliveries.items()}
            table.add(f"produce to a waiting fetch, {name}", "us", values, "0.4")
        compare(
            table,
            servers,
            "small beside a bulk load, p99",
            "us",
            lambda s: bench.small_beside_bulk(s)["p99_us"],
            "3 or less",
        )
        # S002.2: more than 200,000 records a second
        for size, count, aim in ((100, 1_000_000, "0.9"), (1000, 300_000, "1.5")):
            runs = {server.name: [bench.client(server, size, count) for _ in range(ROUNDS)] for server in servers}
            table.add(
                f"confluent-kafka producing {size} B", "rec/s", {k: [r[0] for r in v] for k, v in runs.items()}, aim
            )
            table.add("... broker CPU per million", "s", {k: [r[1] for r in v] for k, v in runs.items()}, "0.6")
        compare(table, servers, "confluent-kafka consuming 100 B", "rec/s", bench.consume, "-")
        table.add("resident memory after the loads", "MB", {s.name: [s.resident_mb()] for s in servers}, "under 100")
    finally:
        for server in servers:
            server.stop()
    fsync(bench, table)
    restarts(bench, table)
    table.print()


def idle(table: Table, servers: list[Server]) -> None:
    """S002.32: what the broker costs a machine while nobody asks, beside a broker on the JVM."""
    table.add(
        "start on a new directory", "ms", {s.name: [s.start_seconds * 1000] for s in servers}, "10 times, under 300"
    )
    table.add("resident memory idle", "MB", {s.name: [s.resident_mb()] for s in servers}, "under 45")
    before = {s.name: s.cpu_seconds() for s in servers}
    time.sleep(5)
    table.add("CPU idle", "%", {s.name: [(s.cpu_seconds() - before[s.name]) / 5 * 100] for s in servers}, "0")


def compare(
    table: Table, servers: list[Server], name: str, unit: str, measure: Callable[[Server], float], aim: str
) -> None:
    """Interleaved, so that what the machine does meanwhile meets all alike."""
    values: dict[str, list[float]] = {server.name: [] for server in servers}
    for _ in range(ROUNDS):
        for server in servers:
            values[server.name].append(measure(server))
    table.add(name, unit, values, aim)
    print(
        f"  {name}: " + ", ".join(f"{k} {statistics.median(v):,.0f}" for k, v in values.items()) + f" {unit}",
        flush=True,
    )


def fsync(bench: Bench, table: Table) -> None:
    kafka, headwater = Kafka("kafka", SYNC), Headwater("headwater", SYNC)
    servers: list[Server] = [kafka, headwater]
    try:
        for server in servers:
            bench.small(server, 10)
        for connections, aim in ((1, "1.5"), (10, "2"), (100, "4")):
            compare(
                table, servers, f"fsync before every ack, {connections} connections", "req/s",
                lambda s, n=connections: bench.small(s, n)["rate"], aim,  # type: ignore[misc]
            )  # fmt: skip
        compare(table, servers, "... 16 KB batches, 10 connections", "MB/s", lambda s: bench.bulk(s, 1000, 16, 10), "3")
    finally:
        for server in servers:
            server.stop()


def restarts(bench: Bench, table: Table) -> None:
    """Over 1 GB of log, after a clean stop and after kill -9."""
    clean: dict[str, list[float]] = {}
    killed: dict[str, list[float]] = {}
    for make in (
        lambda: Kafka("kafka", {}),
        lambda: Headwater("headwater", NO_SYNC),
        lambda: Headwater("headwater default", {}),
    ):
        server = make()
        name = bench.topic(server)
        frame = produce(name, 1000, 1000)
        while size_of(server, name) < 1000:
            bench.closed(server, bench.frame(frame), 1, 0.5)
        server.end()
        server.begin()
        clean[server.name] = [server.start_seconds * 1000]
        bench.closed(server, bench.frame(frame), 1, 0.2)
        server.crash()
        server.begin()
        killed[server.name] = [server.start_seconds * 1000]
        server.stop()
    table.add("start over 1 GB, clean", "ms", clean, "10 times")
    table.add("start over 1 GB, after kill -9", "ms", killed, "10 times")


def size_of(server: Server, topic: str) -> int:
    """Batches of 1 MB."""
    consumer = Consumer({"bootstrap.servers": server.address, "group.id": "size"})
    end = consumer.get_watermark_offsets(TopicPartition(topic, 0), 10)[1]
    consumer.close()
    return int(end) // 1000

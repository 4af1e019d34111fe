"""kill -9 of the broker under an idempotent producer: nothing acknowledged is lost, nothing is doubled."""

import os
import random
import threading
import time
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from headwater.testing.broker import BrokerProcess
from tests.conftest import TEST_SETTINGS, Evidence
from tests.kit.clients import wait_until

KILLS = int(os.environ.get("HEADWATER_TEST_KILLS", "4"))
PARTITIONS = 3


class Traffic:
    """An acks=all, idempotent producer that never stops sending numbered records."""

    def __init__(self, servers: str, topic: str) -> None:
        self._producer = Producer(
            {
                "bootstrap.servers": servers,
                "enable.idempotence": True,
                "linger.ms": 1,
                "reconnect.backoff.max.ms": 200,
                "message.timeout.ms": 120_000,
            }
        )
        self._topic = topic
        self._stop = threading.Event()
        self.sent = 0
        self.acknowledged: dict[tuple[int, int], int] = {}
        self.failed: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self._producer.flush(60) == 0

    def _run(self) -> None:
        while not self._stop.is_set():
            number = self.sent
            try:
                self._producer.produce(
                    self._topic,
                    b"%d" % number,
                    b"k%d" % (number % 30),
                    on_delivery=lambda e, m, n=number: self._done(e, m, n),
                )
                self.sent += 1
            except BufferError:
                pass
            self._producer.poll(0.0005)

    def _done(self, error: object, message: object, number: int) -> None:
        if error is not None:
            self.failed.append(str(error))
        else:
            self.acknowledged[message.partition(), message.offset()] = number  # type: ignore[attr-defined]


def read_all(servers: str, topic: str, partitions: int) -> dict[tuple[int, int], int]:
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "check", "enable.auto.commit": False})
    places = [TopicPartition(topic, index, 0) for index in range(partitions)]
    ends = {index: consumer.get_watermark_offsets(TopicPartition(topic, index), 10)[1] for index in range(partitions)}
    consumer.assign(places)
    found: dict[tuple[int, int], int] = {}
    wait_until(
        lambda: (
            found.update(
                {(m.partition(), m.offset()): int(m.value()) for m in consumer.consume(5000, 0.2) if not m.error()}
            )
            or len(found) >= sum(ends.values())
        ),
        "all records",
        60 + sum(ends.values()) / 10_000,
    )
    consumer.close()
    return found


def kill_again_and_again(data: Path, kills: int, seed: int) -> tuple[int, int]:
    """(kills, acknowledged)"""
    chance = random.Random(seed)
    settings = {**TEST_SETTINGS, "num.partitions": str(PARTITIONS)}
    broker = BrokerProcess.start(data, settings)
    servers = broker.bootstrap_servers
    with Traffic(servers, "t") as traffic:
        for _ in range(kills):
            before = len(traffic.acknowledged)
            wait_until(lambda before=before: len(traffic.acknowledged) > before + 50, "traffic")  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.15))  # any moment: the seed chooses it
            broker.kill()
            broker = BrokerProcess.start(data, settings, listen=servers)
        last = len(traffic.acknowledged)
        wait_until(lambda: len(traffic.acknowledged) > last + 50, "traffic after the last start")
    found = read_all(servers, "t", PARTITIONS)
    assert broker.stop() == 0
    assert not traffic.failed, traffic.failed[:3]
    missing = {place: number for place, number in traffic.acknowledged.items() if found.get(place) != number}
    assert not missing, f"{len(missing)} acknowledged records are not where they were acknowledged, seed {seed}"
    assert len(set(found.values())) == len(found), f"records are doubled, seed {seed}"
    for index in range(PARTITIONS):
        offsets = sorted(offset for partition, offset in found if partition == index)
        assert offsets == list(range(len(offsets))), f"offsets are not dense, seed {seed}"
        numbers = [found[index, offset] for offset in offsets]
        for key in range(30):
            of_key = [number for number in numbers if number % 30 == key]
            assert of_key == sorted(of_key), f"key {key} is out of order, seed {seed}"
    return kills, len(traffic.acknowledged)


@pytest.mark.server
def test_kill_9_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """S004.1, S002.6: after kill -9 what was acknowledged is readable at the same offsets, once, in order, dense."""
    kill_again_and_again(tmp_path / "data", KILLS, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_fifty_kills(tmp_path: Path, evidence: Evidence) -> None:
    """S004.1: fifty times."""
    kills, acknowledged = kill_again_and_again(tmp_path / "data", 50, seed=50)
    evidence.write("broker-kill-9", {"kills": kills, "acknowledged": acknowledged, "lost": 0, "doubled": 0, "seed": 50})

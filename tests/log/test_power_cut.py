"""Acknowledged means on the disk: simulated power cuts at any moment, with everything unsynced at the disk's mercy."""

import asyncio
import os
import random
from pathlib import Path

import pytest

from headwater.broker.topic_config import INTERNAL_SEGMENT_BYTES
from headwater.broker.wire.record import NewRecord, Record, encode_batch
from headwater.testing.file_system import MemoryFileSystem
from tests.kit.simulation import HOME, Answers, SimulatedBroker, produce_answer, produce_body

SEEDS = int(os.environ.get("HEADWATER_TEST_SEEDS", "150"))
TOPIC = "t"


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def run_until_power_cut(seed: int, loop: asyncio.AbstractEventLoop) -> tuple[MemoryFileSystem, dict[int, bytes], int]:
    """Produce, sync and roll at random, then cut the power: the disk, what was acknowledged, what readers had seen."""
    chance = random.Random(seed)
    disk = MemoryFileSystem()
    broker = SimulatedBroker(disk, loop)
    broker.node.create_topic(TOPIC, 1, {INTERNAL_SEGMENT_BYTES: str(chance.choice([300, 2000, 100_000]))})
    acknowledged: dict[int, bytes] = {}
    sent = 0
    seen = 0

    def answered(value: bytes, count: int, frame: bytes) -> None:
        code, offset = produce_answer(frame, TOPIC)
        assert code == 0
        acknowledged.update({offset + i: value + b"%d" % i for i in range(count)})
        partition = broker.node.partition(TOPIC, 0)
        assert partition.log.recovery_point >= offset + count
        assert_synced(disk, offset + count, partition)

    for _ in range(chance.randint(1, 40)):
        action = chance.random()
        if action < 0.6:
            count = chance.randint(1, 5)
            value = b"v%d-" % sent
            sent += 1
            batch = encode_batch([NewRecord(b"k", value + b"%d" % i, 1_700_000_000_000) for i in range(count)])
            client = Answers(lambda frame, value=value, count=count: answered(value, count, frame))
            broker.send(0, 8, produce_body(TOPIC, 0, bytes(batch)), client)
        elif action < 0.9:
            broker.flusher.step()
        else:
            seen = max(seen, broker.node.partition(TOPIC, 0).high_watermark.offset)
    seen = max(seen, broker.node.partition(TOPIC, 0).high_watermark.offset)
    disk.power_cut(chance)
    return disk, acknowledged, seen


def assert_synced(disk: MemoryFileSystem, end_offset: int, partition: object) -> None:
    """Every segment that holds an acknowledged offset is safe up to its last acknowledged byte."""
    log = partition.log  # type: ignore[attr-defined]
    for segment in log.segments:
        for position, header in segment.scan(0):
            if header.last_offset < end_offset:
                file = segment.file
                assert len(file.safe) >= position + header.size_bytes, "answered before it was synced"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_acknowledged_is_missing_after_a_power_cut(seed: int, loop: asyncio.AbstractEventLoop) -> None:
    """S004.1: what was acknowledged with acks=all is there after a power cut, at its offset, and offsets are dense."""
    disk, acknowledged, seen = run_until_power_cut(seed, loop)

    recovered = SimulatedBroker(disk, loop)

    log = recovered.node.partition(TOPIC, 0).log
    records: list[Record] = list(log.records(0, log.log_end_offset))
    assert [record.offset for record in records] == list(range(log.log_end_offset)), f"seed {seed}"
    by_offset = {record.offset: record.value for record in records}
    assert {offset: by_offset.get(offset) for offset in acknowledged} == acknowledged, f"seed {seed}"
    assert log.log_end_offset >= seen, f"a reader saw offset {seen} and it is gone, seed {seed}"


@pytest.mark.parametrize("seed", range(20))
def test_the_leader_epoch_rises_at_an_unclean_start(seed: int, loop: asyncio.AbstractEventLoop) -> None:
    """Clients notice that the log may have been cut: the epoch is a new one, and begins at the log's end."""
    disk, _, seen = run_until_power_cut(seed, loop)

    recovered = SimulatedBroker(disk, loop).node.partition(TOPIC, 0)

    # Where nothing was ever readable the partition may be gone without a trace, and begins anew.
    assert recovered.leader_epoch == 1 or (seen == 0 and recovered.leader_epoch == 0)
    assert recovered.log.epochs.end_offset(0, recovered.log.log_end_offset)[1] == recovered.log.log_end_offset
    again = recovered.leader_epoch
    disk.power_cut(random.Random(seed))
    third = SimulatedBroker(disk, loop).node.partition(TOPIC, 0)
    assert third.leader_epoch == again + 1 or seen == 0, "also when nothing was written since"


def test_a_clean_stop_keeps_the_epoch_and_the_indexes(loop: asyncio.AbstractEventLoop) -> None:
    """After a clean stop nothing is read again and nothing has changed."""
    disk = MemoryFileSystem()
    broker = SimulatedBroker(disk, loop)
    broker.node.create_topic(TOPIC, 1, {INTERNAL_SEGMENT_BYTES: "500"})
    for i in range(20):
        batch = encode_batch([NewRecord(b"k", b"v%d" % i, 1_700_000_000_000 + i)])
        broker.send(0, 8, produce_body(TOPIC, 0, bytes(batch)), Answers())
    broker.node.close()

    again = SimulatedBroker(disk, loop)

    log = again.node.partition(TOPIC, 0).log
    assert log.epochs.latest == 0
    assert log.log_end_offset == 20
    assert [record.value for record in log.records(0, 20)] == [b"v%d" % i for i in range(20)]


def test_a_failed_sync_ends_the_process(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may go on as if the bytes were safe: the second sync would "succeed" with the pages gone."""
    from headwater.broker.log import flush

    ended: list[int] = []
    monkeypatch.setattr(flush.os, "_exit", lambda code: ended.append(code))
    disk = MemoryFileSystem()
    broker = SimulatedBroker(disk, loop)
    broker.node.create_topic(TOPIC, 1, {})
    log = broker.node.partition(TOPIC, 0).log
    flusher = flush.GroupCommitFlusher(loop, broker.node._on_durable)
    batch = encode_batch([NewRecord(b"k", b"v", 1)])
    broker.send(0, 8, produce_body(TOPIC, 0, bytes(batch)), Answers())
    disk.fail = lambda call: OSError(5, "Input/output error") if call == "sync" else None

    flusher.mark_dirty(log)
    flusher.close()

    assert ended == [70]


def test_a_full_disk_refuses_produce_and_loses_nothing(loop: asyncio.AbstractEventLoop) -> None:
    """KAFKA_STORAGE_ERROR until there is space again; what was acknowledged stays, and it goes on by itself."""
    disk = MemoryFileSystem()
    broker = SimulatedBroker(disk, loop)
    broker.node.create_topic(TOPIC, 1, {})
    batch = bytes(encode_batch([NewRecord(b"k", b"v" * 100, 1)]))

    def produce() -> int:
        client = Answers()
        broker.send(0, 8, produce_body(TOPIC, 0, batch), client)
        broker.flusher.step()
        return produce_answer(client.frames[0], TOPIC)[0]

    assert produce() == 0
    disk.capacity_bytes = disk.used_bytes() + 10
    assert produce() == 56
    disk.capacity_bytes = 1 << 30
    assert produce() == 0
    log = broker.node.partition(TOPIC, 0).log
    assert [record.offset for record in log.records(0, log.log_end_offset)] == [0, 1]


def test_files_that_recover_to_different_moments_agree_again(loop: asyncio.AbstractEventLoop) -> None:
    """Partitions, offsets and metadata are files of their own: each may lose its unsynced end, independently."""
    for seed in range(30):
        chance = random.Random(seed)
        disk = MemoryFileSystem()
        broker = SimulatedBroker(disk, loop)
        for name in ("a", "b"):
            broker.node.create_topic(name, 2, {})
        for i in range(20):
            batch = encode_batch([NewRecord(b"k", b"%d" % i, 1)])
            broker.send(0, 8, produce_body(chance.choice("ab"), chance.randint(0, 1), bytes(batch)), Answers())
            if chance.random() < 0.3:
                broker.flusher.step()
        disk.power_cut(chance)

        recovered = SimulatedBroker(disk, loop)

        assert set(recovered.node.metadata.topics) == {"a", "b"}
        for partition in recovered.node.partitions.values():
            offsets = [record.offset for record in partition.log.records(0, partition.log.log_end_offset)]
            assert offsets == list(range(partition.log.log_end_offset))
            assert partition.high_watermark.offset == partition.log.log_end_offset


def test_home_is_the_only_place_that_is_written(loop: asyncio.AbstractEventLoop) -> None:
    """Everything goes through the one door to the disk: nothing real was made."""
    SimulatedBroker(MemoryFileSystem(), loop)

    assert not Path(HOME).exists()

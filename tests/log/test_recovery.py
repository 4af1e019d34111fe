"""What is found after a crash: torn tails, holes, snapshots, strays; and retries that must not be appended again."""

import asyncio
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.broker.log.producer_state import ProducerState
from headwater.broker.topic_config import INTERNAL_SEGMENT_BYTES
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.record import NewRecord, encode_batch
from headwater.broker.wire.record_batch import read_header
from headwater.testing.file_system import MemoryFileSystem
from tests.kit.simulation import HOME, Answers, SimulatedBroker, produce_answer, produce_body

TOPIC = "t"


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def produce(broker: SimulatedBroker, value: bytes, step: bool = True, **batch: int) -> tuple[int, int]:
    """(error code, offset)"""
    client = Answers()
    content = bytes(encode_batch([NewRecord(b"k", value, 1_700_000_000_000)], **batch))
    broker.send(0, 8, produce_body(TOPIC, 0, content), client)
    if step:
        broker.flusher.step()
    return produce_answer(client.frames[0], TOPIC) if client.frames else (-2, -1)


def values(broker: SimulatedBroker) -> list[bytes | None]:
    log = broker.node.partition(TOPIC, 0).log
    return [record.value for record in log.records(log.log_start_offset, log.log_end_offset)]


def started(loop: asyncio.AbstractEventLoop, segment_bytes: int = 300) -> tuple[MemoryFileSystem, SimulatedBroker]:
    disk = MemoryFileSystem()
    broker = SimulatedBroker(disk, loop)
    broker.node.create_topic(TOPIC, 1, {INTERNAL_SEGMENT_BYTES: str(segment_bytes)})
    return disk, broker


@given(cut=st.integers(1, 200), flip=st.integers(0, 7))
@settings(max_examples=60)
def test_a_torn_tail_is_cut_at_the_last_whole_batch(cut: int, flip: int) -> None:
    """A last batch that is cut off anywhere, or damaged anywhere, is gone; all before it is there."""
    loop = asyncio.new_event_loop()
    disk, broker = started(loop, 1 << 20)
    for i in range(5):
        produce(broker, b"value %d" % i)
    file = broker.node.partition(TOPIC, 0).log.active.file
    whole = len(file.content)
    produce(broker, b"the last", step=False)
    torn = file.content[whole:]
    if cut < len(torn):
        del file.content[-cut:]
    else:
        file.content[whole + cut % len(torn)] ^= 1 << flip

    recovered = SimulatedBroker(disk, loop)

    kept = values(recovered)
    assert kept[:5] == [b"value %d" % i for i in range(5)]
    # what is outside the checksum (offset, epoch) may be damaged unseen; the records never
    assert kept[5:] in ([], [b"the last"])
    assert produce(recovered, b"new") == (0, len(kept))
    loop.close()


def test_nothing_follows_a_hole(loop: asyncio.AbstractEventLoop) -> None:
    """When the end of a segment is lost and the next one is not, the log ends at the hole: offsets stay dense."""
    disk, broker = started(loop)
    for i in range(12):
        produce(broker, b"value %d" % i)
    log = broker.node.partition(TOPIC, 0).log
    assert len(log.segments) > 2
    del log.segments[1].file.content[-5:]

    recovered = SimulatedBroker(disk, loop)

    found = values(recovered)
    assert found == [b"value %d" % i for i in range(len(found))]
    assert 0 < len(found) < 12


def test_what_a_crash_left_in_the_page_cache_is_synced_before_it_counts(loop: asyncio.AbstractEventLoop) -> None:
    """After kill -9 the bytes are there and not on the disk: a retry that is answered by them must survive a power cut."""
    disk, broker = started(loop, 1 << 20)
    produce(broker, b"first", producer_id=7, producer_epoch=0, base_sequence=0)
    produce(broker, b"second", step=False, producer_id=7, producer_epoch=0, base_sequence=1)
    again = SimulatedBroker(disk, loop)  # the process was killed; the machine was not

    assert produce(again, b"second", step=False, producer_id=7, producer_epoch=0, base_sequence=1) == (0, 1)
    disk.power_cut(random.Random(1))

    assert values(SimulatedBroker(disk, loop)) == [b"first", b"second"]


def test_a_retry_is_answered_with_the_first_offset(loop: asyncio.AbstractEventLoop) -> None:
    """Idempotence: the same batch again is the same place; a gap and an older epoch are refused. Also after a restart."""
    disk, broker = started(loop, 1 << 20)
    for sequence in range(3):
        assert produce(broker, b"%d" % sequence, producer_id=7, producer_epoch=1, base_sequence=sequence) == (
            0,
            sequence,
        )
    for subject in (broker, SimulatedBroker(disk, loop)):
        assert produce(subject, b"2", producer_id=7, producer_epoch=1, base_sequence=2) == (0, 2)
        assert produce(subject, b"9", producer_id=7, producer_epoch=1, base_sequence=9)[0] == 45
        assert produce(subject, b"0", producer_id=7, producer_epoch=0, base_sequence=3)[0] == 47
        assert values(subject) == [b"0", b"1", b"2"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_producer_state_takes_each_sequence_once(counts: list[int], chance: random.Random) -> None:
    """Whatever is retried, each sequence of a producer is appended exactly once, in order, over snapshots too."""
    state = ProducerState()
    sequence = offset = 0
    appended: list[int] = []
    refusals: set[ErrorCode] = set()
    batches: list[tuple[int, int]] = []
    for count in counts:
        batches.append((sequence, count))
        for first, size in [batches[-1], *chance.sample(batches, min(2, len(batches)))]:
            batch = encode_batch(
                [NewRecord(b"k", b"v", 1)] * size,
                producer_id=1,
                producer_epoch=0,
                base_sequence=first,
                base_offset=offset,
            )
            header = read_header(batch)
            try:
                earlier = state.check(header)
            except ProtocolError as error:
                refusals.add(error.code)
                continue
            if earlier is None:
                state.appended(header)
                appended.extend(range(first, first + size))
                offset += size
        sequence += count
        if chance.random() < 0.3:
            state = ProducerState.decode_snapshot(state.encode_snapshot())

    assert appended == list(range(sequence))
    assert refusals <= {ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER}


def test_a_topic_that_was_deleted_and_made_again_begins_empty(loop: asyncio.AbstractEventLoop) -> None:
    """Neither its records nor its checkpoints come back, also when the broker crashed in between."""
    disk, broker = started(loop)
    for i in range(10):
        produce(broker, b"old %d" % i)
    broker.node.write_checkpoints()
    broker.node._commit(
        broker.node.metadata.decide_delete(broker.node.metadata.topics[TOPIC])
    )  # and then the power goes

    recovered = SimulatedBroker(disk, loop)
    recovered.node.create_topic(TOPIC, 1, {})
    assert values(recovered) == []
    assert produce(recovered, b"new") == (0, 0)
    assert any(name.endswith("-stray") for name in disk.list_directory(HOME)), "set aside, not deleted"
    assert values(SimulatedBroker(disk, loop)) == [b"new"]


def test_the_metadata_topic_can_be_neither_made_nor_written(loop: asyncio.AbstractEventLoop) -> None:
    """Its folder is the broker's own."""
    _, broker = started(loop)

    with pytest.raises(ProtocolError, match="prohibited"):
        broker.node.auto_create("__cluster_metadata")

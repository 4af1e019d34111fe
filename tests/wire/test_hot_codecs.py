"""Produce and Fetch, written by hand, held against kio in every version; fed whole, cut off, and with garbage."""

import contextlib
import datetime
import importlib
import io
import struct
import typing
import uuid

import kio.serial
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kio.static.primitive import i8, i16, i32, i32Timedelta, i64

from headwater.broker.wire import fetch, produce
from headwater.broker.wire.errors import MalformedMessage
from headwater.broker.wire.record import (
    MAX_RECORDS_BYTES,
    XERIAL_MAGIC,
    NewRecord,
    compress,
    decode_records,
    decompress,
    encode_batch,
)

PRODUCE_VERSIONS = range(3, 14)
FETCH_VERSIONS = range(4, 19)


def kio_module(name: str, version: int, kind: str) -> typing.Any:
    return importlib.import_module(f"kio.schema.{name}.v{version}.{kind}")


def write(value: object) -> bytes:
    out = io.BytesIO()
    kio.serial.entity_writer(type(value))(out, value)
    return out.getvalue()


def milliseconds(count: int) -> typing.Any:
    return i32Timedelta.parse(datetime.timedelta(milliseconds=count))


names = st.text("abcdefghij-._", min_size=1, max_size=30)
offsets = st.integers(0, 1 << 50)
TOPIC_ID = uuid.UUID(int=7)


@pytest.mark.parametrize("version", PRODUCE_VERSIONS)
@settings(max_examples=20)
@given(data=st.data())
def test_a_produce_request_is_read_as_kio_wrote_it(version: int, data: st.DataObject) -> None:
    """Names or ids, partitions, and the records as views, byte for byte."""
    module = kio_module("produce", version, "request")
    batch = encode_batch([NewRecord(b"k", data.draw(st.binary(max_size=50)), 5)])
    partitions = data.draw(st.lists(st.integers(0, 100), max_size=3))
    name = data.draw(names)
    topic = {"topic_id": TOPIC_ID} if version >= 13 else {"name": name}
    request = module.ProduceRequest(
        transactional_id=None,
        acks=i16(data.draw(st.sampled_from([-1, 0, 1]))),
        timeout=milliseconds(1000),
        topic_data=(
            module.TopicProduceData(
                **topic,
                partition_data=tuple(
                    module.PartitionProduceData(index=i32(index), records=bytes(batch)) for index in partitions
                ),
            ),
        ),
    )
    frame = memoryview(write(request))

    read = produce.decode_request(frame, version, 0)

    assert (read.transactional_id, read.acks, read.timeout_ms) == (None, request.acks, 1000)
    assert read.topics[0].topic == (TOPIC_ID.bytes if version >= 13 else name)
    assert [(each.partition, bytes(each.records or b"")) for each in read.topics[0].partitions] == [
        (index, bytes(batch)) for index in partitions
    ]
    for end in range(len(frame)):
        with pytest.raises(MalformedMessage):
            produce.decode_request(frame[:end], version, 0)


@pytest.mark.parametrize("version", PRODUCE_VERSIONS)
@settings(max_examples=20)
@given(data=st.data())
def test_kio_reads_our_produce_answer(version: int, data: st.DataObject) -> None:
    """Every field of every version is where Kafka's declaration has it."""
    module = kio_module("produce", version, "response")
    errors = tuple(data.draw(st.lists(st.tuples(st.integers(0, 9), st.text(max_size=9)), max_size=2)))
    message = data.draw(st.none() | st.text(max_size=20))
    answer = produce.PartitionAnswer(3, 0, data.draw(offsets), -1, data.draw(offsets), message, errors)
    topic = TOPIC_ID.bytes if version >= 13 else "name"

    encoded = bytes(produce.encode_response([produce.TopicAnswer(topic, [answer, answer])], version))
    read, size = kio.serial.entity_reader(module.ProduceResponse)(encoded, 0)

    assert size == len(encoded)
    for each in read.responses[0].partition_responses:
        assert (each.index, each.error_code, each.base_offset) == (3, 0, answer.base_offset)
        if version >= 5:
            assert each.log_start_offset == answer.log_start_offset
        if version >= 8:
            assert each.error_message == message
            found = tuple((e.batch_index, e.batch_index_error_message) for e in each.record_errors)
            assert found == errors


@pytest.mark.parametrize("version", FETCH_VERSIONS)
@settings(max_examples=20)
@given(data=st.data())
def test_a_fetch_request_is_read_as_kio_wrote_it(version: int, data: st.DataObject) -> None:
    """Sessions, epochs, offsets, forgotten topics, tags that nobody here knows."""
    module = kio_module("fetch", version, "request")
    name = data.draw(names)
    topic = {"topic_id": TOPIC_ID} if version >= 13 else {"topic": name}
    wanted = data.draw(
        st.lists(st.tuples(st.integers(0, 99), offsets, st.integers(0, 1 << 30), st.integers(-1, 9)), max_size=3)
    )
    partitions = tuple(
        _only_known(
            module.FetchPartition,
            partition=i32(index), fetch_offset=i64(offset), partition_max_bytes=i32(size), current_leader_epoch=i32(epoch),
            last_fetched_epoch=i32(-1), log_start_offset=i64(-1),
        )
        for index, offset, size, epoch in wanted
    )  # fmt: skip
    forgotten: tuple[typing.Any, ...] = ()
    if version >= 7:
        forgotten = (module.ForgottenTopic(**topic, partitions=(i32(1), i32(2))),)
    request = _only_known(
        module.FetchRequest,
        replica_id=i32(-1), max_wait=milliseconds(500), min_bytes=i32(1), max_bytes=i32(1000), isolation_level=i8(1),
        session_id=i32(77), session_epoch=i32(5), topics=(module.FetchTopic(**topic, partitions=partitions),),
        forgotten_topics_data=forgotten, rack_id="rack",
    )  # fmt: skip
    frame = memoryview(write(request))

    read = fetch.decode_request(frame, version, 0)

    key = TOPIC_ID.bytes if version >= 13 else name
    assert (read.max_wait_ms, read.min_bytes, read.max_bytes, read.isolation_level) == (500, 1, 1000, 1)
    assert (read.session_id, read.session_epoch) == ((77, 5) if version >= 7 else (0, -1))
    assert read.topics[0].topic == key
    assert read.topics[0].partitions == [
        fetch.PartitionFetch(index, epoch if version >= 9 else -1, offset, size)
        for index, offset, size, epoch in wanted
    ]
    assert read.forgotten == ([(key, [1, 2])] if version >= 7 else [])


def _only_known(cls: typing.Any, **values: object) -> typing.Any:
    """The fields that this version has."""
    return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})


@pytest.mark.parametrize("version", FETCH_VERSIONS)
@settings(max_examples=20)
@given(data=st.data())
def test_kio_reads_our_fetch_answer(version: int, data: st.DataObject) -> None:
    """Every field of every version is where Kafka's declaration has it; the records come as they were stored."""
    module = kio_module("fetch", version, "response")
    batch = bytes(encode_batch([NewRecord(b"k", data.draw(st.binary(max_size=50)), 5)]))
    answers = [
        fetch.PartitionAnswer(1, 0, 10, 9, 2, batch),
        fetch.PartitionAnswer(2, 1, -1, -1, -1, b""),
        fetch.PartitionAnswer(3, 0, data.draw(offsets), 0, 0, batch),
    ]
    topic = TOPIC_ID.bytes if version >= 13 else "name"

    encoded = b"".join(map(bytes, fetch.encode_response([fetch.TopicAnswer(topic, answers)], version, 0, 42)))
    read, size = kio.serial.entity_reader(module.FetchResponse)(encoded, 0)

    assert size == len(encoded)
    if version >= 7:
        assert read.session_id == 42
    for ours, theirs in zip(answers, read.responses[0].partitions, strict=True):
        assert (theirs.partition_index, theirs.error_code) == (ours.partition, ours.error_code)
        assert (theirs.high_watermark, theirs.last_stable_offset) == (ours.high_watermark, ours.last_stable_offset)
    assert encoded.count(batch) == 2


@given(st.binary(max_size=300), st.integers(3, 18))
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes, version: int) -> None:
    """A decoder given any bytes answers a request or MalformedMessage."""
    frame = memoryview(garbage)
    with contextlib.suppress(MalformedMessage):
        produce.decode_request(frame, min(version, 13), 0)
    with contextlib.suppress(MalformedMessage):
        fetch.decode_request(frame, max(version, 4), 0)


records = st.builds(
    NewRecord,
    key=st.none() | st.binary(max_size=20),
    value=st.none() | st.binary(max_size=100),
    timestamp=st.integers(0, 1 << 42),
    headers=st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=5)), max_size=3).map(tuple),
)


@given(st.lists(records, min_size=1, max_size=20), st.integers(0, 4))
def test_records_survive_every_compression(batch: list[NewRecord], codec: int) -> None:
    """What is encoded is decoded to the same records, with offsets from the base on."""
    found = list(decode_records(encode_batch(batch, base_offset=100, compression=codec)))

    assert [record.offset for record in found] == list(range(100, 100 + len(batch)))
    assert [(r.key, r.value, r.timestamp, r.headers) for r in found] == [
        (r.key, r.value, r.timestamp, r.headers) for r in batch
    ]


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_records_that_grow_beyond_all_bounds_are_refused(codec: int) -> None:
    """A small batch can say that it is a huge one; what fits the bound is read whole."""
    fits, bomb = bytes(MAX_RECORDS_BYTES), bytes(MAX_RECORDS_BYTES + 1)

    assert len(decompress(codec, compress(codec, fits))) == len(fits)
    with pytest.raises(MalformedMessage, match="at most 104857600 bytes"):
        decompress(codec, compress(codec, bomb))


def test_snappy_blocks_are_bounded_together() -> None:
    """The framing of Java and Go clients: many blocks, one bound."""
    block = compress(2, bytes(MAX_RECORDS_BYTES // 2 + 1))
    framed = struct.pack(">i", len(block)) + block
    head = XERIAL_MAGIC + bytes(8)

    assert len(decompress(2, head + framed)) == MAX_RECORDS_BYTES // 2 + 1
    with pytest.raises(MalformedMessage, match="at most 104857600"):
        decompress(2, head + framed + framed)

"""Reading up to an end: all that lies before it, nothing beyond it, and an error when it doesn't come."""

from types import SimpleNamespace

import pytest
from confluent_kafka import Message, Producer

from headwater.kafka import reader as reader_module
from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed
from headwater.kafka.reader import KafkaReader, offset_of, place_of, read_all
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.running import settings_for


def write(engine: Engine, topic: str, partition: int, count: int, **config: str) -> None:
    producer = Producer({"bootstrap.servers": engine.bootstrap_servers, **config})
    for i in range(count):
        producer.produce(topic, f"{i}", partition=partition)
    assert producer.flush(30) == 0


def places_in(messages: list[Message]) -> list[tuple[str, int, int]]:
    return sorted((*place_of(message), offset_of(message)) for message in messages)


def test_a_range_is_read_and_then_the_next(engine: Engine, unique: str) -> None:
    """Each record once, although the client has fetched beyond the first ends. (both engines)"""
    settings = settings_for(engine)
    KafkaAdmin(settings).create_topic(unique, 2)
    write(engine, unique, 0, 100)
    write(engine, unique, 1, 50)
    positions = {(unique, 0): 10, (unique, 1): 0}
    reader = KafkaReader(settings, {})
    first = [each for batch in reader.up_to({(unique, 0): 40, (unique, 1): 7}, positions) for each in batch]
    assert positions == {(unique, 0): 40, (unique, 1): 7}
    second = [each for batch in reader.up_to({(unique, 0): 100, (unique, 1): 50}, positions) for each in batch]
    reader.close()
    assert places_in(first) == [(unique, 0, i) for i in range(10, 40)] + [(unique, 1, i) for i in range(7)]
    assert places_in(second) == [(unique, 0, i) for i in range(40, 100)] + [(unique, 1, i) for i in range(7, 50)]


def test_an_end_that_does_not_come_is_an_error(engine: Engine, unique: str) -> None:
    """What there is has been handed out before; it says which partition and how long it waited. (both engines)"""
    settings = settings_for(engine)
    KafkaAdmin(settings).create_topic(unique, 1)
    write(engine, unique, 0, 3)
    positions: dict[tuple[str, int], int] = {(unique, 0): 0}
    found: list[Message] = []
    reader = KafkaReader(settings, {})
    for batch in reader.up_to({(unique, 0): 3}, positions):
        found += batch
    batches = reader.up_to({(unique, 0): 5}, positions, 2.0)
    with pytest.raises(ConsumerFailed, match=rf"{unique}-0 could not be read to its end: nothing came for 2 s"):
        found.extend(each for batch in batches for each in batch)
    reader.close()
    assert (len(found), positions) == (3, {(unique, 0): 3})


def test_what_its_reader_does_meanwhile_is_no_silence(
    embedded: Engine, unique: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """However long it takes over a batch; and it may leave in the middle."""
    settings = settings_for(embedded)
    KafkaAdmin(settings).create_topic(unique, 1)
    write(embedded, unique, 0, 20)
    monkeypatch.setattr(reader_module, "TAKE", 5)
    now = [0.0]
    monkeypatch.setattr(reader_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    reader = KafkaReader(settings, {})
    positions = {(unique, 0): 0}
    found = 0
    for batch in reader.up_to({(unique, 0): 20}, positions, 10):
        found += len(batch)
        now[0] += 100
    assert found == 20
    left = reader.up_to({(unique, 0): 20}, {(unique, 0): 0}, 10)
    next(left)
    reader.close()
    del left
    assert not [each for each in recwarn if "closed" in str(each.message)]


def test_what_is_not_there_is_an_error(embedded: Engine, unique: str) -> None:
    """With its name."""
    settings = settings_for(embedded)
    with pytest.raises(AdminError, match=f"there is no topic {unique}"):
        list(read_all(settings, KafkaAdmin(settings), [unique]))


def test_all_of_topics_ends_where_they_end_now(engine: Engine, unique: str) -> None:
    """Several topics, one of them empty, and progress up to the whole. (both engines)"""
    settings, admin = settings_for(engine), KafkaAdmin(settings_for(engine))
    topics = [f"{unique}.{i}" for i in range(3)]
    for i, topic in enumerate(topics):
        admin.create_topic(topic, 2)
        write(engine, topic, 1, 10 * i)
    told: list[tuple[int, int]] = []
    found = []
    for message in read_all(settings, admin, topics, lambda done, total: told.append((done, total))):
        found.append(message)
        if len(found) == 1:
            write(engine, topics[1], 0, 5)
    assert len(found) == 30
    assert told[-1] == (30, 30)


def test_what_is_not_committed_is_neither_read_nor_waited_for(kafka: Engine, unique: str) -> None:
    """Records of an open transaction and what is behind them; the marker of one that has ended is no record."""
    settings, admin = settings_for(kafka), KafkaAdmin(settings_for(kafka))
    admin.create_topic(unique, 1)

    def values() -> list[bytes | None]:
        return [each.value() for each in read_all(settings, admin, [unique])]

    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": unique})
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(unique, b"committed")
    producer.commit_transaction(30)
    wait_until(lambda: values() == [b"committed"], "the transaction's marker")
    producer.begin_transaction()
    producer.produce(unique, b"open")
    assert producer.flush(30) == 0
    write(kafka, unique, 0, 3)
    assert values() == [b"committed"]
    producer.commit_transaction(30)
    wait_until(lambda: len(values()) == 5, "the transaction's marker")

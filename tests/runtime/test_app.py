"""What an application may rely on, on both engines."""

import asyncio
import json
import threading
import time
from collections import defaultdict

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from headwater import App, Envelope, Event, Retry, Settings, Topic
from headwater.event.topic import InvalidTopic
from headwater.kafka.admin import KafkaAdmin
from headwater.operations.lag import partition_rows
from headwater.runtime.handler import InvalidHandler
from headwater.runtime.publish import NoTopic
from headwater.runtime.subscription import CannotStart
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.running import Running, settings_for


class Placed(Event):
    order_id: str
    number: int


class Shipped(Event):
    order_id: str


def topic_for(name: str, partitions: int = 3) -> Topic:
    return Topic(name, key="order_id", events=[Placed], partitions=partitions)


def publish_all(engine: Engine, topic: Topic, events: list[Placed]) -> None:
    app = App("publisher", topics=[topic], settings=settings_for(engine))

    async def main() -> None:
        async with app.lifespan():
            await asyncio.gather(*(app.publish(event) for event in events))

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_events_of_a_key_are_handled_once_each_and_in_order(engine: Engine, unique: str, kind: str) -> None:
    """S004.8: everything that was published is handled, in the order of its key. (both engines)"""
    topic = topic_for(unique)
    app = App(unique, settings=settings_for(engine))
    seen: dict[str, list[int]] = defaultdict(list)

    if kind == "async":

        @app.handler(topic, group=unique)
        async def handle(event: Placed) -> None:
            seen[event.order_id].append(event.number)
    else:

        @app.handler(topic, group=unique)
        def handle_sync(event: Placed) -> None:
            seen[event.order_id].append(event.number)

    publish_all(engine, topic, [Placed(f"o{i % 10}", i) for i in range(500)])
    with Running(app):
        wait_until(lambda: sum(map(len, seen.values())) >= 500, "500 events")

    assert {key: sorted(numbers) for key, numbers in seen.items()} == dict(seen)
    assert sum(map(len, seen.values())) == 500


def test_a_restart_goes_on_at_the_frontier(engine: Engine, unique: str) -> None:
    """S004.8: a clean stop commits what was handled, no more and no less. (both engines)"""
    topic = topic_for(unique, 1)
    seen: list[int] = []

    def make() -> App:
        app = App(unique, settings=settings_for(engine))

        @app.handler(topic, group=unique)
        async def handle(event: Placed) -> None:
            seen.append(event.number)

        return app

    publish_all(engine, topic, [Placed("o", i) for i in range(100)])
    with Running(make()):
        wait_until(lambda: len(seen) >= 100, "the first hundred")
    publish_all(engine, topic, [Placed("o", i) for i in range(100, 150)])
    with Running(make()):
        wait_until(lambda: len(seen) >= 150, "the rest")

    assert seen == list(range(150))


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_commit_never_passes_an_event_that_is_at_work(engine: Engine, unique: str, kind: str) -> None:
    """S004.8: while an event is being handled, neither it nor what is behind it is committed. (both engines)"""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(engine))
    begun, go_on = threading.Event(), threading.Event()
    seen: list[int] = []

    if kind == "async":

        @app.handler(topic, group=unique)
        async def handle(event: Placed) -> None:
            if event.number == 3:
                begun.set()
                while not go_on.is_set():
                    await asyncio.sleep(0.01)
            seen.append(event.number)
    else:

        @app.handler(topic, group=unique)
        def handle_sync(event: Placed) -> None:
            if event.number == 3:
                begun.set()
                go_on.wait(30)
            seen.append(event.number)

    publish_all(engine, topic, [Placed("o", i) for i in range(10)])
    admin = KafkaAdmin(settings_for(engine))
    with Running(app):
        assert begun.wait(30)

        def committed() -> int:
            position = admin.committed(unique).get((unique, 0))
            return position.offset if position is not None else 0

        wait_until(lambda: committed() >= 3, "a commit of what is done")
        assert committed() == 3
        go_on.set()
        wait_until(lambda: committed() == 10, "the rest")

    assert seen == list(range(10))


def test_a_key_that_fails_delays_no_other_key(engine: Engine, unique: str) -> None:
    """S004.14: while one key is being retried all others are handled; its own events wait, in order. (both engines)"""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(engine))
    broken = threading.Event()
    broken.set()
    seen: list[tuple[str, int]] = []

    @app.handler(topic, group=unique, retry=Retry(100, "200ms..500ms"))
    async def handle(event: Placed) -> None:
        if event.order_id == "bad" and broken.is_set():
            raise ConnectionError("the warehouse does not answer")
        seen.append((event.order_id, event.number))

    publish_all(engine, topic, [Placed(key, i) for i in range(50) for key in ("bad", "good", "fine")])
    admin = KafkaAdmin(settings_for(engine))
    with Running(app):
        wait_until(lambda: len(seen) >= 100, "the other keys")
        assert "bad" not in {key for key, _ in seen}

        def frontier() -> int:
            position = admin.committed(unique).get((unique, 0))
            return position.offset if position is not None else 0

        wait_until(lambda: frontier() == 150, "the commit: what is parked is settled")
        wait_until(lambda: any("1 key" in (row.waiting or "") for row in partition_rows(admin, unique)), "the reason")
        broken.clear()
        wait_until(lambda: len(seen) >= 150, "recovery")
        wait_until(lambda: not any(row.waiting for row in partition_rows(admin, unique)), "the reason to be gone")

    assert [number for key, number in seen if key == "bad"] == list(range(50))


def test_without_a_retry_topic_a_failing_event_holds_its_key_and_the_frontier(engine: Engine, unique: str) -> None:
    """retry=None needs no topics of its own: the event is tried in place until it works, and the group says so."""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(engine))
    broken = threading.Event()
    broken.set()
    seen: list[int] = []

    @app.handler(topic, group=unique, retry=None)
    async def handle(event: Placed) -> None:
        if event.number == 5 and broken.is_set():
            raise ConnectionError("the warehouse does not answer")
        seen.append(event.number)

    publish_all(engine, topic, [Placed("o", i) for i in range(10)] + [Placed("other", 100 + i) for i in range(10)])
    admin = KafkaAdmin(settings_for(engine))
    with Running(app):

        def why() -> list[str]:
            return [row.waiting for row in partition_rows(admin, unique) if row.waiting]

        wait_until(lambda: bool(why()), "the reason in the group's description")
        assert "the warehouse does not answer" in why()[0]
        wait_until(lambda: [n for n in seen if n >= 100] == list(range(100, 110)), "the other key")
        assert [n for n in seen if n < 100] == list(range(5))
        broken.clear()
        wait_until(lambda: len(seen) >= 20, "recovery")
        wait_until(lambda: not why(), "the reason to be gone")

    assert [n for n in seen if n < 100] == list(range(10))
    assert not [name for name in admin.topic_names() if name.startswith(f"{unique}.")]


def test_an_undecodable_event_is_set_aside_and_stops_nothing(engine: Engine, unique: str) -> None:
    """S004.14: the bytes reach `<topic>.<group>.dead` untouched, with their coordinates; the others are handled."""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(engine))
    seen: list[int] = []

    @app.handler(topic, group=unique)
    async def handle(event: Placed) -> None:
        seen.append(event.number)

    publish_all(engine, topic, [Placed("o", i) for i in range(5)])
    producer = Producer({"bootstrap.servers": engine.bootstrap_servers})
    poison = [b"\xff\x00 no json", b'{"eventType":"Placed"}', None]
    for value in poison:
        producer.produce(unique, value, b"o", headers=[("theirs", b"kept")])
    producer.flush(10)
    publish_all(engine, topic, [Placed("o", i) for i in range(5, 10)])
    with Running(app):
        wait_until(lambda: len(seen) >= 10, "the good ones")

    assert seen == list(range(10))
    dead = read(engine, f"{unique}.{unique}.dead", 3)
    assert [message.value() for message in dead] == poison
    assert [message.key() for message in dead] == [b"o"] * 3
    headers = dict(dead[0].headers() or [])
    assert headers["theirs"] == b"kept"
    assert headers["headwater-topic"] == unique.encode()
    assert headers["headwater-offset"] == b"5"
    assert headers["headwater-error"]


def read(engine: Engine, topic: str, count: int) -> list:
    consumer = Consumer({"bootstrap.servers": engine.bootstrap_servers, "group.id": "reader"})
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list = []
    wait_until(lambda: found.extend(consumer.consume(100, 0.2)) or len(found) >= count, f"{count} records")
    consumer.close()
    return found


def test_each_handler_is_a_group_of_its_own(engine: Engine, unique: str) -> None:
    """S003-10.8: a handler that always fails never delays another one's events. (both engines)"""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(engine))
    seen: list[int] = []

    @app.handler(topic, group=f"{unique}-email")
    async def email(event: Placed) -> None:
        raise RuntimeError("no mail today")

    @app.handler(topic, group=f"{unique}-stock")
    async def stock(event: Placed) -> None:
        seen.append(event.number)

    publish_all(engine, topic, [Placed("o", i) for i in range(200)])
    with Running(app):
        wait_until(lambda: len(seen) >= 200, "the healthy handler")

    assert seen == list(range(200))


def test_correlation_is_carried_and_causation_is_the_event_before(engine: Engine, unique: str) -> None:
    """S001.2: what a handler returns keeps the story's id and names its cause. (both engines)"""
    topic = topic_for(unique, 1)
    shipments = Topic(f"{unique}.shipped", key="order_id", events=[Shipped], partitions=1)
    app = App(unique, topics=[shipments], settings=settings_for(engine))
    first: list[Envelope] = []
    second: list[Envelope] = []

    @app.handler(topic, group=f"{unique}-1")
    async def ship(event: Placed, envelope: Envelope) -> Shipped:
        first.append(envelope)
        return Shipped(event.order_id)

    @app.handler(shipments, group=f"{unique}-2")
    def notice(event: Shipped, envelope: Envelope) -> None:
        second.append(envelope)

    publish_all(engine, topic, [Placed("o", 1)])
    with Running(app):
        wait_until(lambda: bool(second), "the event that followed")

    assert second[0].correlation_id == first[0].correlation_id
    assert second[0].causation_id == first[0].event_id
    assert first[0].causation_id is None
    assert second[0].source == unique


def test_a_long_handler_keeps_its_membership(engine: Engine, unique: str) -> None:
    """S004.2: a handler may take longer than the session: the group doesn't notice, the event is handled once."""
    topic = topic_for(unique, 1)
    app = App(unique, settings=settings_for(engine))
    seen: list[int] = []

    @app.handler(topic, group=unique)
    def handle(event: Placed) -> None:
        if event.number == 0:
            time.sleep(8)
        seen.append(event.number)

    publish_all(engine, topic, [Placed("o", i) for i in range(3)])
    with Running(app):
        wait_until(lambda: len(seen) >= 3, "the long one and those behind it")

    assert seen == [0, 1, 2]


def test_two_instances_share_the_partitions_and_lose_nothing(engine: Engine, unique: str) -> None:
    """S002.10: joining and leaving moves partitions; every event is handled by somebody. (both engines)"""
    topic = topic_for(unique, 4)
    seen: dict[str, list[int]] = {"one": [], "two": []}

    def make(name: str) -> App:
        app = App(unique, settings=settings_for(engine))

        @app.handler(topic, group=unique)
        async def handle(event: Placed) -> None:
            seen[name].append(event.number)

        return app

    with Running(make("one")):
        with Running(make("two")):
            admin = KafkaAdmin(settings_for(engine))

            def shared() -> bool:
                members = admin.describe_group(unique).members
                return sorted(len(member.partitions) for member in members) == [2, 2]

            wait_until(shared, "both to have two partitions")
            publish_all(engine, topic, [Placed(f"o{i}", i) for i in range(400)])
            wait_until(lambda: len(set(seen["one"]) | set(seen["two"])) == 400, "all events")
            assert seen["one"]
            assert seen["two"]
        publish_all(engine, topic, [Placed(f"o{i}", i) for i in range(400, 500)])
        wait_until(lambda: len(set(seen["one"]) | set(seen["two"])) == 500, "the rest, by the one that stayed")


def test_declared_topics_are_made_and_existing_ones_left_alone(engine: Engine, unique: str) -> None:
    """Partitions and configs are as declared; a topic that is there is never altered. (both engines)"""
    admin = KafkaAdmin(settings_for(engine))
    old = Topic(f"{unique}.old", key="order_id", events=[Shipped], partitions=7, retention="1y")
    admin.create_topic(old.name, 2)
    new = Topic(f"{unique}.new", key="order_id", events=[Placed], partitions=5, retention="30d")
    app = App(unique, topics=[old, new], settings=settings_for(engine))

    async def main() -> None:
        async with app.lifespan():
            pass

    asyncio.run(main())

    counts = admin.partition_counts()
    assert (counts[old.name], counts[new.name]) == (2, 5)
    assert admin.topic_configs(new.name)["retention.ms"].value == str(30 * 24 * 3600 * 1000)
    assert admin.topic_configs(old.name)["retention.ms"].is_default


def test_without_the_right_to_create_topics_the_start_says_what_to_create(engine: Engine, unique: str) -> None:
    """HEADWATER_CREATE_TOPICS=false: refused, with the commands."""
    app = App(unique, topics=[topic_for(unique)], settings=Settings(engine.bootstrap_servers, create_topics=False))

    async def main() -> None:
        async with app.lifespan():
            pass

    with pytest.raises(CannotStart, match=f"headwater topics create {unique} --partitions 3"):
        asyncio.run(main())


def test_what_can_not_work_is_refused_when_it_is_declared() -> None:
    """Errors are found at the start and say what to change."""
    topic = topic_for("t")
    app = App("a", topics=[topic], settings=Settings())

    with pytest.raises(InvalidHandler, match="doesn't list"):

        @app.handler(topic, group="g")
        async def other(event: Shipped) -> None: ...

    with pytest.raises(InvalidHandler, match="annotate its first parameter"):

        @app.handler(topic, group="g")
        async def bare(event) -> None: ...  # type: ignore[no-untyped-def]

    with pytest.raises(InvalidHandler, match="a Retry is needed"):

        @app.handler(topic, group="g", retry=5)  # type: ignore[arg-type]
        async def counted(event: Placed) -> None: ...

    with pytest.raises(InvalidTopic, match="has no such field"):
        Topic("t", key="customer_id", events=[Placed])

    with pytest.raises(NoTopic, match="can have one topic only"):
        App("b", topics=[topic, topic_for("u")], settings=Settings())


GOLDEN = {
    "eventId": str,
    "eventType": "Placed",
    "eventVersion": "v1",
    "timestamp": str,
    "source": "order-service",
    "correlationId": "c-1",
    "causationId": "request-1",
    "data": {"orderId": "o-1", "number": 3},
    "metadata": {"userId": "u-1", "sessionId": "s-1"},
}


def test_the_envelope_is_the_agreed_one() -> None:
    """S001.2: names, order and values of the envelope."""
    from headwater.event.codec import Decoder, encode
    from headwater.event.envelope import Cause, Metadata

    encoded = encode(Placed("o-1", 3), "order-service", Cause("c-1", "request-1", Metadata("u-1", "s-1")))
    content = json.loads(encoded.value)

    assert list(content) == list(GOLDEN)
    for name, expected in GOLDEN.items():
        assert isinstance(content[name], str) if expected is str else content[name] == expected
    assert Decoder([Placed]).decode(encoded.value).data == Placed("o-1", 3)

"""Back-pressure and rebalances together: a partition that was paused is resumed for whoever gets it."""

import asyncio
import threading

import pytest

from headwater import App, Event, Topic
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import KafkaConsumer, TopicPartition
from headwater.runtime import consumer_thread
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.running import Running, settings_for


class Counted(Event):
    key: str
    number: int


def test_a_partition_that_was_paused_is_resumed_after_a_rebalance(
    embedded: Engine, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S004.2: a slow handler fills its buffer and pauses; members come and go; every event is handled in the end."""
    monkeypatch.setattr(consumer_thread, "FULL_EVENTS", 20)
    monkeypatch.setattr(consumer_thread, "PAUSE_AFTER_SECONDS", 0.1)
    monkeypatch.setattr(consumer_thread, "BATCH", 20)
    topic = Topic(unique, key="key", events=[Counted], partitions=2)
    seen: set[int] = set()
    paused: set[int] = set()
    pause = KafkaConsumer.pause

    def remember(consumer: KafkaConsumer, partitions: list[TopicPartition]) -> None:
        paused.update(place.partition for place in partitions)
        pause(consumer, partitions)

    monkeypatch.setattr(KafkaConsumer, "pause", remember)
    slow = threading.Event()
    slow.set()

    def make() -> App:
        app = App(unique, settings=settings_for(embedded))

        @app.handler(topic, group=unique)
        async def handle(event: Counted) -> None:
            if slow.is_set():
                await asyncio.sleep(0.3)
            seen.add(event.number)

        return app

    publisher = App("publisher", topics=[topic], settings=settings_for(embedded))

    async def publish() -> None:
        async with publisher.lifespan():
            await asyncio.gather(*(publisher.publish(Counted(f"k{i}", i)) for i in range(2000)))

    asyncio.run(publish())
    admin = KafkaAdmin(settings_for(embedded))
    with Running(make()):
        wait_until(lambda: paused == {0, 1}, "both partitions to be paused")
        with Running(make()):
            wait_until(lambda: len(admin.describe_group(unique).members) == 2, "a second member")
            wait_until(
                lambda: all(member.partitions for member in admin.describe_group(unique).members), "its partition"
            )
        wait_until(lambda: len(admin.describe_group(unique).members) == 1, "the second member to leave")
        slow.clear()
        wait_until(lambda: len(seen) == 2000, "all events", 60)

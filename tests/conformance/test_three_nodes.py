"""Apache Kafka with three nodes: the same program, unchanged, with one node killed."""

import asyncio
import threading

import pytest

from headwater import App, Event, Settings, Topic
from headwater.kafka.admin import KafkaAdmin
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.kafka import KafkaCluster, make_archive
from tests.kit.running import Running, settings_for


class Counted(Event):
    key: str
    number: int


@pytest.mark.server
def test_events_go_on_when_one_of_three_nodes_is_killed(unique: str) -> None:
    """S004.8: acknowledged before and after the kill, handled in order of their keys, none missing. (three nodes)"""
    make_archive()
    cluster = KafkaCluster(nodes=3).start()
    try:
        engine = Engine("kafka3", cluster.bootstrap_servers)
        topic = Topic(unique, key="key", events=[Counted], partitions=3)
        app = App(unique, settings=settings_for(engine))
        publisher = App("publisher", topics=[topic], settings=settings_for(engine))
        seen: dict[str, list[int]] = {}
        killed = threading.Event()

        @app.handler(topic, group=unique)
        async def handle(event: Counted) -> None:
            seen.setdefault(event.key, []).append(event.number)

        async def publish() -> None:
            async with publisher.lifespan():
                for number in range(300):
                    await publisher.publish(Counted(f"k{number % 9}", number))
                    if number == 100:
                        cluster.kill_node(cluster.nodes[2])
                        killed.set()

        with Running(app):
            asyncio.run(publish())
            wait_until(lambda: sum(len(set(numbers)) for numbers in seen.values()) == 300, "all events", 90)

        assert killed.is_set()
        for numbers in seen.values():
            first = list(dict.fromkeys(numbers))
            assert first == sorted(first)
        description = KafkaAdmin(Settings(cluster.nodes[0].address)).describe_topics([unique])[0]
        assert all(len(partition.replicas) == 3 for partition in description.partitions)
    finally:
        cluster.stop()

"""A retry topic that can't be written while the application runs: its partition waits, says why, and goes on by itself."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from headwater import App, Event, Retry, Topic
from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.settings import Settings
from headwater.testing.broker import BrokerProcess
from tests.kit.clients import wait_until
from tests.kit.kafka import KafkaCluster
from tests.kit.mount import mounted
from tests.kit.running import CLIENT, Running
from tests.kit.severing import SeveringProxy

LIST_OFFSETS = 2

AUTHORIZER = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
    "auto.create.topics.enable": "false",
}


class Paid(Event):
    account: str
    number: int
    text: str = ""


class Shop:
    """An application whose event 3 fails until it was tried often enough to have been parked."""

    def __init__(self, servers: str, name: str) -> None:
        self.settings = Settings(servers, kafka={**CLIENT, "message.timeout.ms": "3000"})
        self.name = name
        self.topic = Topic(name, key="account", events=[Paid], partitions=1)
        self.retry_topic = f"{name}.{name}.retry"
        self.admin = KafkaAdmin(self.settings)
        self.app = App(name, settings=self.settings)
        self.seen: list[int] = []
        self.tries = 0

        @self.app.handler(self.topic, group=name, retry=Retry(20, "100ms"))
        async def handle(event: Paid) -> None:
            if event.number == 3 and self.tries < 5:
                self.tries += 1
                raise RuntimeError("later")
            self.seen.append(event.number)

    def publish(self, numbers: range) -> None:
        app = App("publisher", topics=[self.topic], settings=self.settings)

        async def main() -> None:
            async with app.lifespan():
                for number in numbers:
                    await app.publish(Paid(f"a{number % 3}", number))

        asyncio.run(main())

    def says(self, text: str) -> bool:
        return text in str(self.admin.committed(self.name))

    def is_through(self, count: int) -> bool:
        return {place.offset for place in self.admin.committed(self.name).values()} == {count}

    def check(self, count: int) -> None:
        """Each event once, in the order of its key."""
        assert sorted(self.seen) == list(range(count))
        for account in range(3):
            numbers = [number for number in self.seen if number % 3 == account]
            assert numbers == sorted(numbers)


@contextmanager
def without_the_right(servers: str, topic: str) -> Iterator[None]:
    """Everybody may do with the topic what they like, but for writing to it."""
    client = AdminClient({"bootstrap.servers": servers})
    allowed = [
        AclBinding(
            ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:*", "*", operation, AclPermissionType.ALLOW
        )
        for operation in (AclOperation.READ, AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS)
    ]
    for future in client.create_acls(allowed).values():
        future.result()
    yield
    every = AclBindingFilter(
        ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, None, None, AclOperation.ANY, AclPermissionType.ANY
    )
    for future in client.delete_acls([every]).values():
        future.result()


@pytest.fixture
def guarded() -> Iterator[str]:
    cluster = KafkaCluster(settings=AUTHORIZER).start()
    yield cluster.bootstrap_servers
    cluster.stop()


@pytest.mark.server
def test_a_retry_topic_that_may_not_be_written_stops_its_partition(guarded: str, unique: str) -> None:
    """S004.8: the group says so, nothing is lost, and it goes on when the right is given. (Apache Kafka: the embedded
    broker has no authorizer)"""
    shop = Shop(guarded, unique)
    with Running(shop.app):
        shop.publish(range(3))
        wait_until(lambda: shop.is_through(3), "the first events")
        with without_the_right(guarded, shop.retry_topic):
            shop.publish(range(3, 30))
            wait_until(lambda: shop.says("t be written: "), "the reason in the commit", 60)
            assert shop.says("uthoriz")
            assert 6 not in shop.seen
        wait_until(lambda: shop.is_through(30) and len(shop.seen) == 30, "the rest", 90)
    shop.check(30)


@pytest.mark.server
@pytest.mark.parametrize("engine_name", ["embedded", "kafka"])
def test_a_retry_topic_that_is_deleted_stops_its_partition_until_there_is_one(
    engine_name: str, unique: str, tmp_path: Path
) -> None:
    """S004.8: the group says so, nothing is lost, and it goes on when the topic is made again. (both engines)"""
    settings = {"auto.create.topics.enable": "false"}
    if engine_name == "embedded":
        engine: BrokerProcess | KafkaCluster = BrokerProcess.start(tmp_path / "data", settings)
    else:
        engine = KafkaCluster(settings=settings).start()
    try:
        shop = Shop(engine.bootstrap_servers, unique)
        with Running(shop.app):
            shop.publish(range(3))
            wait_until(lambda: shop.is_through(3), "the first events")
            client = AdminClient({"bootstrap.servers": engine.bootstrap_servers})
            client.delete_topics([shop.retry_topic])[shop.retry_topic].result()
            shop.publish(range(3, 30))
            wait_until(lambda: shop.says("t be written: "), "the reason in the commit", 60)
            shop.admin.create_topic(shop.retry_topic, 1, 1, {"cleanup.policy": "compact"})
            wait_until(lambda: shop.is_through(30) and len(shop.seen) == 30, "the rest", 90)
        shop.check(30)
    finally:
        engine.stop()


@pytest.mark.server
def test_a_full_disk_loses_nothing_and_is_over_when_there_is_room(
    unique: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """S004.8: parked records that a full disk refuses stop their partition; with room again it goes on. (embedded)"""
    with mounted(tmp_path / "disk", "size=64m") as disk, BrokerProcess.start(disk / "data") as broker:
        shop = Shop(broker.bootstrap_servers, unique)
        with Running(shop.app):
            shop.publish(range(3))
            wait_until(lambda: shop.is_through(3), "the first events")
            ballast = disk / "ballast"
            shop.tries = -100  # it fails for longer than the disk is full
            shop.publish(range(3, 30))
            with ballast.open("wb") as file:
                try:
                    while True:
                        file.write(bytes(65536))
                        file.flush()
                except OSError:
                    pass
            wait_until(lambda: "partition_stopped" in caplog.text, "a parked record to be refused", 60)
            ballast.unlink()
            shop.tries = 5
            wait_until(lambda: shop.is_through(30) and len(shop.seen) == 30, "the rest", 90)
        shop.check(30)


def test_an_end_that_is_not_known_is_never_taken_for_one(tmp_path: Path) -> None:
    """A broker that dies between the question for a partition's end and the answer: an error, not a number. The client says
    success then, with no offset; taken for an end it would say that nothing is parked."""
    with SeveringProxy(api_key=LIST_OFFSETS) as proxy:
        settings = {"advertised.listeners": f"PLAINTEXT://{proxy.address}"}
        with BrokerProcess.start(tmp_path / "data", settings) as broker:
            proxy.start(broker.bootstrap_servers)
            admin = KafkaAdmin(Settings(proxy.address))
            admin.create_topic("parked", 3)
            places = [("parked", index) for index in range(3)]
            wait_until(lambda: _known(admin, places), "the topic's leaders")
            proxy.is_armed = True
            with pytest.raises(AdminError, match="parked"):
                admin.end_offsets(places)
            assert proxy.severed.is_set()


def _known(admin: KafkaAdmin, places: list[tuple[str, int]]) -> bool:
    try:
        return set(admin.end_offsets(places).values()) == {0}
    except AdminError:
        return False

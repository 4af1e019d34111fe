"""Administration, offsets and retention, on both engines."""

import subprocess
import time

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from headwater import Settings
from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.producer import Acknowledged, KafkaProducer, Profile, producer_config
from headwater.testing.broker import BrokerProcess
from tests.conftest import Engine
from tests.kit.clients import Confluent, Sent, wait_until
from tests.kit.kafka import KafkaCluster, java
from tests.kit.murmur2 import partition_for

HOUR_MS = 3600 * 1000


def admin_for(engine: Engine) -> KafkaAdmin:
    return KafkaAdmin(Settings(engine.bootstrap_servers))


def test_topics_are_created_described_grown_and_deleted(engine: Engine, unique: str) -> None:
    """A topic has the partitions and configs that it was made with; it can grow, and go. (both engines)"""
    admin = admin_for(engine)
    assert admin.create_topic(unique, 3, configs={"retention.ms": "12345678", "cleanup.policy": "compact,delete"})
    assert not admin.create_topic(unique, 3)
    configs = admin.topic_configs(unique)
    assert (configs["retention.ms"].value, configs["retention.ms"].is_default) == ("12345678", False)
    assert configs["cleanup.policy"].value == "compact,delete"
    assert configs["segment.bytes"].is_default

    admin.grow_topic(unique, 5)
    wait_until(lambda: admin.partition_counts()[unique] == 5, "five partitions")
    with pytest.raises(AdminError, match="would not be an increase"):
        admin.grow_topic(unique, 2)
    admin.delete_topic(unique)
    wait_until(lambda: unique not in admin.partition_counts(), "the topic to be gone")


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"no.such.config": "1"}, "Unknown topic config name"),
        ({"retention.ms": "soon"}, "retention.ms"),
        ({"segment.bytes": "1"}, "segment.bytes"),
        ({"cleanup.policy": "shred"}, "cleanup.policy"),
    ],
)
def test_a_config_that_can_not_be_is_refused(
    engine: Engine, unique: str, configs: dict[str, str], message: str
) -> None:
    """INVALID_CONFIG, with the config's name; nothing is created. (both engines)"""
    with pytest.raises(AdminError, match=message):
        admin_for(engine).create_topic(unique, 1, configs=configs)

    assert unique not in admin_for(engine).partition_counts()


def test_configs_change_one_by_one(engine: Engine, unique: str) -> None:
    """Set, append, delete; the rest stays. (both engines)"""
    admin = admin_for(engine)
    admin.create_topic(unique, 1, configs={"retention.ms": "1000", "max.message.bytes": "2000"})
    resource = ConfigResource(
        ResourceType.TOPIC,
        unique,
        incremental_configs=[
            ConfigEntry("retention.ms", "5000", incremental_operation=AlterConfigOpType.SET),
            ConfigEntry("cleanup.policy", "compact", incremental_operation=AlterConfigOpType.APPEND),
            ConfigEntry("max.message.bytes", "", incremental_operation=AlterConfigOpType.DELETE),
        ],
    )
    client = AdminClient({"bootstrap.servers": engine.bootstrap_servers})
    client.incremental_alter_configs([resource])[resource].result(10)

    wait_until(lambda: admin.topic_configs(unique)["retention.ms"].value == "5000", "the new value")
    configs = admin.topic_configs(unique)
    assert configs["cleanup.policy"].value == "delete,compact"
    assert configs["max.message.bytes"].is_default


def test_max_message_bytes_is_enforced_as_soon_as_it_is_set(engine: Engine, unique: str) -> None:
    """A batch above it is refused, and what follows is taken. (both engines)"""
    admin_for(engine).create_topic(unique, 1, configs={"max.message.bytes": "1000"})
    producer = Producer({"bootstrap.servers": engine.bootstrap_servers, "enable.idempotence": False})
    errors: list[object] = []
    producer.produce(unique, b"x" * 5000, on_delivery=lambda error, message: errors.append(error))
    producer.flush(10)
    producer.produce(unique, b"x" * 100, on_delivery=lambda error, message: errors.append(error))
    producer.flush(10)

    assert errors[0] is not None
    assert errors[0].name() == "MSG_SIZE_TOO_LARGE"  # type: ignore[attr-defined]
    assert errors[1] is None


def test_a_keyless_record_is_refused_on_a_compacted_topic(engine: Engine, unique: str) -> None:
    """INVALID_RECORD: it could never be replaced. (both engines)"""
    admin_for(engine).create_topic(unique, 1, configs={"cleanup.policy": "compact"})
    producer = Producer({"bootstrap.servers": engine.bootstrap_servers})
    errors: list[object] = []
    for key in (None, b"k"):
        producer.produce(unique, b"v", key, on_delivery=lambda error, message: errors.append(error))
        producer.flush(10)

    assert errors[0].name() == "INVALID_RECORD"  # type: ignore[union-attr]
    assert errors[1] is None


def test_offsets_are_found_by_time(engine: Engine, unique: str) -> None:
    """The first record at or after the time, the end when there is none. (both engines)"""
    now = round(time.time() * 1000)
    producer = Producer({"bootstrap.servers": engine.bootstrap_servers, "linger.ms": 50})
    admin = admin_for(engine)
    admin.create_topic(unique, 1)
    for i in range(100):
        producer.produce(unique, b"v", partition=0, timestamp=now - 100_000 + i * 1000)
    producer.flush(10)
    place = (unique, 0)

    assert admin.offsets_at([place], now - 100_000)[place] == 0
    assert admin.offsets_at([place], now - 100_000 + 41_500)[place] == 42
    assert admin.offsets_at([place], now + 5000)[place] == 100
    assert admin.offsets_at([place], 0)[place] == 0


def test_records_before_an_offset_are_deleted_on_request(engine: Engine, unique: str) -> None:
    """The log start moves; a consumer below it begins there. (both engines)"""
    servers = engine.bootstrap_servers
    Confluent().produce(servers, unique, [Sent(b"k", b"%d" % i) for i in range(10)])
    client = AdminClient({"bootstrap.servers": servers})
    for future in client.delete_records([TopicPartition(unique, 0, 6)]).values():
        assert future.result(10).low_watermark == 6

    assert admin_for(engine).start_offsets([(unique, 0)])[unique, 0] == 6
    found = Confluent().consume(servers, unique, 4, group=unique)
    assert [record.offset for record in found] == [6, 7, 8, 9]


def retention_holds(servers: str, topic: str) -> None:
    """Records of 169 hours are gone, those of 167 hours are readable."""
    admin = KafkaAdmin(Settings(servers))
    admin.create_topic(topic, 2, configs={"retention.ms": str(168 * HOUR_MS), "file.delete.delay.ms": "100"})
    now = round(time.time() * 1000)
    producer = Producer({"bootstrap.servers": servers})
    for partition, age_hours in ((0, 169), (1, 167)):
        for _ in range(20):
            producer.produce(topic, b"v" * 100, partition=partition, timestamp=now - age_hours * HOUR_MS)
    assert producer.flush(10) == 0

    wait_until(lambda: admin.start_offsets([(topic, 0)])[topic, 0] == 20, "the old records to go", 60)
    assert admin.start_offsets([(topic, 1)])[topic, 1] == 0
    assert admin.end_offsets([(topic, 0)])[topic, 0] == 20


CHECK_OFTEN = {"log.retention.check.interval.ms": "300", "log.initial.task.delay.ms": "300"}


@pytest.mark.server
def test_retention_of_seven_days_on_the_embedded_broker(tmp_path: object, unique: str) -> None:
    """S000.12: at 167 h readable, at 169 h gone, the log start moved."""
    with BrokerProcess.start(tmp_path / "data", {"log.retention.check.interval.ms": "300"}) as broker:  # type: ignore[operator]
        retention_holds(broker.bootstrap_servers, unique)


@pytest.mark.server
def test_retention_of_seven_days_on_kafka(kafka: Engine, unique: str) -> None:
    """S000.12: the same on Apache Kafka."""
    cluster = KafkaCluster(settings=CHECK_OFTEN).start()
    try:
        retention_holds(cluster.bootstrap_servers, unique)
    finally:
        cluster.stop()


KEYS = [f"practitioner-{i}" for i in range(60)]


def test_a_key_lands_where_every_kafka_client_puts_it(engine: Engine, unique: str) -> None:
    """S000.8: murmur2(key) mod 6, from Python and from a Java producer. (both engines)"""
    servers = engine.bootstrap_servers
    admin_for(engine).create_topic(unique, 6)
    producer = KafkaProducer(Settings(servers))
    placed: dict[str, int] = {}
    for key in KEYS:
        result = producer.send_and_wait(unique, key.encode(), b"python", [])
        assert isinstance(result, Acknowledged)
        placed[key] = result.partition
    producer.close()
    lines = "\n".join(f"{key}:java" for key in KEYS)
    command = java(
        "org.apache.kafka.tools.ConsoleProducer",
        "--bootstrap-server", servers, "--topic", unique,
        "--reader-property", "parse.key=true", "--reader-property", "key.separator=:",
    )  # fmt: skip
    subprocess.run(command, input=lines, text=True, check=True, timeout=60, stdout=subprocess.DEVNULL)

    found = Confluent().consume(servers, unique, 2 * len(KEYS))
    from_java = {r.key.decode(): r.partition for r in found if r.value == b"java" and r.key}

    expected = {key: partition_for(key.encode(), 6) for key in KEYS}
    assert placed == expected
    assert from_java == expected


def test_uuid_keys_spread_evenly_over_twenty_partitions() -> None:
    """S003-10.7: 100,000 UUIDs over 20 partitions: the fullest has less than 1.1 times the mean."""
    import random
    import uuid

    chance = random.Random(20)
    counts = [0] * 20
    for _ in range(100_000):
        counts[partition_for(str(uuid.UUID(int=chance.getrandbits(128), version=4)).encode(), 20)] += 1

    assert max(counts) < 1.1 * 5000


def test_orders_of_one_key_stay_in_order_and_others_go_in_parallel(engine: Engine, unique: str) -> None:
    """S003-10.7: order per order id, parallel orders. (both engines)"""
    admin_for(engine).create_topic(unique, 20)
    records = [Sent(b"order-%d" % (i % 50), b"%d" % i) for i in range(1000)]
    Confluent().produce(engine.bootstrap_servers, unique, records)

    found = sorted(Confluent().consume(engine.bootstrap_servers, unique, 1000), key=lambda r: (r.partition, r.offset))
    by_key: dict[bytes | None, list[int]] = {}
    for record in found:
        by_key.setdefault(record.key, []).append(int(record.value or b""))
    assert all(numbers == sorted(numbers) for numbers in by_key.values())
    assert len({record.partition for record in found}) > 10


def test_the_throughput_profile_is_the_seeds_producer() -> None:
    """S002.3: snappy, acks=all, 16,384 bytes, at most 1,000 messages a batch, idempotent."""
    config = producer_config(Settings(), Profile.THROUGHPUT)

    assert config["compression.type"] == "snappy"
    assert config["acks"] == "all"
    assert config["batch.size"] == 16384
    assert config["batch.num.messages"] == 1000
    assert config["enable.idempotence"] is True


def test_the_profiles_weigh_latency_against_throughput() -> None:
    """S002.4: two named profiles; both acknowledge by all and partition alike."""
    latency, throughput = (producer_config(Settings(), profile) for profile in Profile)

    assert (latency["linger.ms"], throughput["linger.ms"]) == (0, 5)
    assert latency["compression.type"] == "none"
    for name in ("acks", "enable.idempotence", "partitioner"):
        assert latency[name] == throughput[name]


def test_snappy_batches_are_stored_as_the_producer_made_them(embedded: Engine, unique: str) -> None:
    """S002.3: batches on the disk carry codec 2."""
    producer = KafkaProducer(Settings(embedded.bootstrap_servers), Profile.THROUGHPUT)
    for i in range(100):
        producer.send(unique, b"k", b"value %d " % i * 20, [], lambda result: None)
    producer.close()

    import socket

    host, _, port = embedded.bootstrap_servers.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        import struct

        name = unique.encode()
        body = (
            struct.pack(">iiiibih", -1, 0, 1, 1 << 20, 0, 1, len(name)) + name + struct.pack(">iiqi", 1, 0, 0, 1 << 20)
        )
        frame = struct.pack(">hhih", 1, 4, 1, 1) + b"x" + body
        connection.sendall(struct.pack(">i", len(frame)) + frame)
        answer = b""
        while len(answer) < 4 or len(answer) < 4 + struct.unpack_from(">i", answer)[0]:
            answer += connection.recv(1 << 20)
    records = answer[8 + 4 + 4 + 2 + len(name) + 4 + 4 + 2 + 8 + 8 + 4 + 4 :]
    assert struct.unpack_from(">h", records, 21)[0] & 7 == 2


def test_a_group_can_be_reset_only_while_nobody_is_in_it(engine: Engine, unique: str) -> None:
    """S002.11: refused while the group is active; then any offset. (both engines)"""
    servers = engine.bootstrap_servers
    Confluent().produce(servers, unique, [Sent(b"k", b"%d" % i) for i in range(10)])
    admin = admin_for(engine)
    consumer = Consumer({"bootstrap.servers": servers, "group.id": unique, "auto.offset.reset": "earliest"})
    consumer.subscribe([unique])
    wait_until(lambda: bool(consumer.consume(10, 0.2)), "the first records")
    with pytest.raises(AdminError):
        admin.alter_committed(unique, {(unique, 0): (3, "")})
    consumer.close()

    admin.alter_committed(unique, {(unique, 0): (3, "")})

    assert admin.committed(unique)[unique, 0].offset == 3
    assert [record.offset for record in Confluent().consume(servers, unique, 7, group=unique)] == list(range(3, 10))
    admin.delete_group(unique)
    assert unique not in admin.group_states()


def test_a_static_member_returns_without_a_rebalance(engine: Engine, unique: str) -> None:
    """KIP-345: a restart within the session keeps the assignment; the other member notices nothing. (both engines)"""
    servers = engine.bootstrap_servers
    client = AdminClient({"bootstrap.servers": servers})
    for future in client.create_topics([NewTopic(unique, 4)]).values():
        future.result(10)
    moves: list[str] = []

    def member(name: str) -> Consumer:
        consumer = Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": unique,
                "group.instance.id": name,
                "session.timeout.ms": 20_000,
                "heartbeat.interval.ms": 300,
                "auto.offset.reset": "earliest",
                "partition.assignment.strategy": "range",
            }
        )
        consumer.subscribe(
            [unique],
            on_assign=lambda _, p: moves.append(f"{name}+{len(p)}"),
            on_revoke=lambda _, p: moves.append(f"{name}-"),
        )
        return consumer

    one, two = member("one"), member("two")

    def settled() -> bool:
        one.poll(0.05)
        two.poll(0.05)
        return len(one.assignment()) == 2 and len(two.assignment()) == 2

    wait_until(settled, "two partitions each")
    held = sorted(place.partition for place in two.assignment())
    two.close()  # a static member does not leave
    moves.clear()
    two = member("two")
    wait_until(lambda: (one.poll(0.05), two.poll(0.05)) and len(two.assignment()) == 2, "its return")
    for _ in range(10):
        one.poll(0.05)

    assert sorted(place.partition for place in two.assignment()) == held
    assert [move for move in moves if move.startswith("one")] == []
    one.close()
    two.close()


def test_a_committed_offset_carries_its_metadata(engine: Engine, unique: str) -> None:
    """What is committed beside the offset is what is read. (both engines)"""
    servers = engine.bootstrap_servers
    Confluent().produce(servers, unique, [Sent(b"k", b"v")])
    consumer = Consumer({"bootstrap.servers": servers, "group.id": unique})
    consumer.commit(offsets=[TopicPartition(unique, 0, 1, metadata="hw1:why")], asynchronous=False)
    consumer.close()

    assert admin_for(engine).committed(unique)[unique, 0].metadata.rstrip("\0") == "hw1:why"


def test_a_transactional_producer_is_told_at_once_that_there_are_no_transactions(embedded: Engine) -> None:
    """A fatal error, never one on which clients wait for ever."""
    producer = Producer({"bootstrap.servers": embedded.bootstrap_servers, "transactional.id": "t"})
    started = time.monotonic()

    with pytest.raises(KafkaException) as raised:
        producer.init_transactions(20)

    assert raised.value.args[0].fatal() or not raised.value.args[0].retriable()
    assert time.monotonic() - started < 15


@pytest.mark.server
def test_a_group_survives_a_restart_of_the_broker(broker: BrokerProcess, unique: str) -> None:
    """Members, generation and offsets are kept: consumers go on without a new rebalance."""
    servers = broker.bootstrap_servers
    Confluent().produce(servers, unique, [Sent(b"k", b"%d" % i) for i in range(5)])
    moves: list[int] = []
    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": unique,
            "auto.offset.reset": "earliest",
            "reconnect.backoff.max.ms": 300,
            "heartbeat.interval.ms": 300,
        }
    )
    consumer.subscribe([unique], on_assign=lambda _, p: moves.append(len(p)))
    got: list[object] = []
    wait_until(lambda: got.extend(consumer.consume(10, 0.1)) or len(got) >= 5, "the first five")
    consumer.commit(asynchronous=False)
    broker.kill()
    again = BrokerProcess.start(broker.data, listen=servers)
    Confluent().produce(servers, unique, [Sent(b"k", b"%d" % i) for i in range(5, 8)])
    wait_until(
        lambda: got.extend(m for m in consumer.consume(10, 0.1) if not m.error()) or len(got) >= 8, "the rest", 60
    )

    for _ in range(20):  # six heartbeats and more: a member that is not known would be told so
        consumer.poll(0.1)
    assert moves == [1]
    consumer.close()
    assert again.stop() == 0

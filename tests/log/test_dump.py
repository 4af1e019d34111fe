"""Kafka's own tools read our files: DumpLogSegments passes on a whole data directory."""

import random
import subprocess
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from headwater.testing.broker import BrokerProcess
from tests.kit.kafka import java
from tests.kit.require import unavailable

DUMP = "org.apache.kafka.tools.DumpLogSegments"
# What the tool prints about damage; its exit code says little.
DAMAGE = (
    "isvalid: false",
    "invalid bytes at the end",
    "Mismatches in",
    "Found timestamp mismatch",
    "are not found in",
    "out of order timestamp",
    "corrupt",
    "Exception",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What real clients leave: all codecs, idempotent producers, rolled segments, a group, a crash in between."""
    data = tmp_path_factory.mktemp("dump") / "data"
    with BrokerProcess.start(data) as broker:
        admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
        small = {"segment.bytes": "1048576", "index.interval.bytes": "1024"}
        for future in admin.create_topics([NewTopic("t", 2, config=small)]).values():
            future.result(10)
        produce(broker, 6000)
        broker.kill()
    with BrokerProcess.start(data) as broker:
        produce(broker, 3000)
        consumer = Consumer(
            {"bootstrap.servers": broker.bootstrap_servers, "group.id": "g", "auto.offset.reset": "earliest"}
        )
        consumer.subscribe(["t"])
        while not consumer.consume(1000, 1.0):
            pass
        consumer.commit(asynchronous=False)
        consumer.close()
        assert broker.stop() == 0
    return data


def produce(broker: BrokerProcess, count: int) -> None:
    for codec in ("none", "gzip", "snappy", "lz4", "zstd"):
        producer = Producer(
            {
                "bootstrap.servers": broker.bootstrap_servers,
                "compression.type": codec,
                "enable.idempotence": True,
                "batch.num.messages": 50,
                "linger.ms": 2,
            }
        )
        values = random.Random(count)
        for i in range(count // 5):
            producer.produce("t", values.randbytes(400), b"k%d" % (i % 50))
        assert producer.flush(30) == 0


def dump(files: list[Path], *flags: str) -> str:
    command = java(DUMP, *flags, "--files", ",".join(map(str, files)))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0 and "ClassNotFound" in done.stderr:
        unavailable("DumpLogSegments", done.stderr[:200])
    return done.stdout + done.stderr


def assert_sound(output: str) -> None:
    assert not [line for line in output.splitlines() if any(word in line for word in DAMAGE)]


@pytest.mark.server
def test_segments_and_indexes_pass_deep_iteration(directory: Path) -> None:
    """Every batch is valid, every index entry names the last offset of the batch at its position."""
    folders = [directory / "t-0", directory / "t-1"]
    files = [path for folder in folders for path in sorted(folder.glob("0*.*")) if path.suffix != ".snapshot"]
    assert sum(path.suffix == ".log" for path in files) > 2, "the segments rolled"

    output = dump(files, "--deep-iteration")

    assert_sound(output)
    assert output.count("isvalid: true") > 100


@pytest.mark.server
@pytest.mark.parametrize("flag", ["--index-sanity-check", "--verify-index-only"])
def test_indexes_pass(directory: Path, flag: str) -> None:
    """The indexes are what Kafka would have written."""
    files = [path for folder in ("t-0", "t-1") for path in sorted((directory / folder).glob("0*.*index"))]
    output = dump(files, flag)

    assert_sound(output)


@pytest.mark.server
def test_producer_snapshots_can_be_read(directory: Path) -> None:
    """The producer snapshot is in Kafka's format, with its checksum."""
    output = dump(sorted((directory / "t-0").glob("*.snapshot")))

    assert_sound(output)
    assert "producerId: " in output


@pytest.mark.server
def test_the_groups_log_can_be_read(directory: Path) -> None:
    """`__consumer_offsets` holds Kafka's records: group and offsets."""
    output = dump(sorted((directory / "__consumer_offsets-0").glob("*.log")), "--offsets-decoder")

    assert_sound(output)
    assert '"group":"g"' in output
    assert "CONSUMER" in output.upper()


@pytest.mark.server
def test_the_metadata_log_can_be_read(directory: Path) -> None:
    """`__cluster_metadata` holds Kafka's records: topics, partitions, configs."""
    output = dump(sorted((directory / "__cluster_metadata-0").glob("*.log")), "--cluster-metadata-decoder")

    assert_sound(output)
    for record in ("TOPIC_RECORD", "PARTITION_RECORD", "CONFIG_RECORD", "PRODUCER_IDS_RECORD"):
        assert record in output


@pytest.mark.server
def test_the_tool_finds_damage(directory: Path, tmp_path: Path) -> None:
    """The check can fail: a changed byte in a segment is found."""
    segment = next((directory / "t-0").glob("*.log"))
    damaged = tmp_path / segment.name
    content = bytearray(segment.read_bytes())
    content[200] ^= 0xFF
    damaged.write_bytes(content)

    output = dump([damaged], "--deep-iteration")

    assert any(word in output for word in DAMAGE)

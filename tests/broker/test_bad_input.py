"""Bad input at the broker's door: its connection ends, everybody else goes on."""

import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from hypothesis import HealthCheck, given, settings

from headwater.broker.dispatch import APIS
from headwater.broker.wire.message import NEVER, Message
from headwater.broker.wire.record import NewRecord, compress, encode_batch
from headwater.broker.wire.record_batch import HEADER_SIZE, checksum
from headwater.testing.broker import BrokerProcess
from tests.kit.clients import Confluent, Sent
from tests.kit.mount import mounted
from tests.kit.simulation import produce_answer, produce_body
from tests.wire.test_messages import declared, structures

pytestmark = pytest.mark.server


MANY = 100


class Wire:
    """A raw connection."""

    def __init__(self, servers: str) -> None:
        host, _, port = servers.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), 10)
        self.socket.settimeout(10)

    def send_frame(self, frame: bytes) -> None:
        self.socket.sendall(struct.pack(">i", len(frame)) + frame)

    def request(self, key: int, version: int, body: bytes, correlation: int = 7) -> bytes:
        """The answer with its size and correlation id."""
        self.send_frame(struct.pack(">hhih", key, version, correlation, 4) + b"test" + body)
        return self.answer()

    def answer(self) -> bytes:
        head = self._exactly(4)
        return head + self._exactly(struct.unpack(">i", head)[0])

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionError("closed")
            data += more
        return data

    def is_closed(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


API_VERSIONS_0 = (18, 0, b"")


def assert_serves(servers: str) -> None:
    assert Wire(servers).request(*API_VERSIONS_0)[8:10] == b"\0\0"


def frame(key: int, version: int, body: bytes = b"") -> bytes:
    return struct.pack(">hhih", key, version, 7, 4) + b"test" + body


BAD_BYTES = {
    "negative size": struct.pack(">i", -5) + b"xxxx",
    "size above socket.request.max.bytes": struct.pack(">i", 200_000_000) + b"xxxx",
    "empty frame": struct.pack(">i", 0),
    "shorter than a header": struct.pack(">i", 3) + b"abc",
    "client id longer than the frame": struct.pack(">ihhih", 10, 3, 1, 1, 500),
    "unknown API": struct.pack(">i", 14) + frame(999, 0),
    "unknown version": struct.pack(">i", 14) + frame(3, 99),
    "Produce version that nobody serves": struct.pack(">i", 14) + frame(0, 2),
    "garbage": b"\x00\x00\x00\x20" + bytes(range(32)),
    "GET / HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "truncated body": struct.pack(">i", 15) + frame(3, 1, b"\x00"),
    "list longer than the frame": struct.pack(">i", 18) + frame(3, 1, struct.pack(">i", 1 << 30)),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_a_frame_that_breaks_the_protocol_closes_its_connection_only(embedded: object, name: str) -> None:
    """The peer at fault is cut off, without an answer, as Kafka does; an open connection beside it goes on."""
    servers = embedded.bootstrap_servers  # type: ignore[attr-defined]
    neighbour = Wire(servers)
    wire = Wire(servers)
    wire.socket.sendall(BAD_BYTES[name])

    assert wire.is_closed()
    assert neighbour.request(*API_VERSIONS_0)
    assert_serves(servers)


def test_random_frames_never_end_the_broker(broker: BrokerProcess) -> None:
    """Two thousand frames of garbage behind valid headers: the broker lives, and its memory stays where it was."""
    chance = random.Random(7)
    assert_serves(broker.bootstrap_servers)
    before = broker.resident_bytes()
    for _ in range(2000):
        wire = Wire(broker.bootstrap_servers)
        key, version = chance.choice([0, 1, 2, 3, 8, 9, 10, 11, 14, 19, 22, 32, 44, 75]), chance.randint(0, 13)
        wire.send_frame(frame(key, version, chance.randbytes(chance.randint(0, 60))))
        wire.socket.close()

    assert_serves(broker.bootstrap_servers)
    assert broker.resident_bytes() < before + 40 * 1024 * 1024
    assert broker.stop() == 0


def test_no_well_formed_request_fails_inside_the_broker(broker: BrokerProcess) -> None:
    """Whatever the fields say, there is an answer for it: `request_failed` in the log is a mistake of the broker's."""
    keys = {api.name: api for api in APIS.values()}
    sent: deque[Wire] = deque()
    for _, kind, version, message in declared():
        if kind != "request":
            continue
        api = keys[message.__name__.removesuffix("Request")]
        tags = b"\0" if version >= api.flexible and api.flexible != NEVER else b""

        head = struct.pack(">hhih", api.key, version, 7, 4) + b"test" + tags

        @settings(max_examples=5, suppress_health_check=list(HealthCheck))
        @given(value=structures(message, version))
        def send(value: Message) -> None:
            wire = Wire(broker.bootstrap_servers)
            wire.send_frame(head + bytes(value.encode(version)))  # noqa: B023 - called at once
            sent.append(wire)
            if len(sent) > MANY:
                sent.popleft().socket.close()  # its request was taken long ago

        send()

    assert_serves(broker.bootstrap_servers)
    assert broker.stop() == 0
    assert "request_failed" not in broker.log.read_text()


def test_an_unknown_version_of_api_versions_is_answered_in_version_0(embedded: object) -> None:
    """KIP-511: error 35 with the range of ApiVersions, so that a newer client can ask again."""
    answer = Wire(embedded.bootstrap_servers).request(18, 99, b"")  # type: ignore[attr-defined]
    code, count, key, low, high = struct.unpack_from(">hihhh", answer, 8)

    assert (code, count, key, low, high) == (35, 1, 18, 0, 4)


def test_frames_that_come_byte_by_byte_are_understood(embedded: object) -> None:
    """The network may cut anywhere."""
    wire = Wire(embedded.bootstrap_servers)  # type: ignore[attr-defined]
    data = struct.pack(">i", 14) + frame(18, 0)
    for i in range(len(data)):
        wire.socket.sendall(data[i : i + 1])

    assert wire.answer()[8:10] == b"\0\0"


def test_many_requests_at_once_are_answered_in_order(embedded: object) -> None:
    """Pipelining: answers come in the order of the requests, each with its correlation id."""
    wire = Wire(embedded.bootstrap_servers)  # type: ignore[attr-defined]
    data = b"".join(struct.pack(">ihhih", 14, 18, 0, correlation, 4) + b"test" for correlation in range(5000))
    wire.socket.sendall(data)

    assert [struct.unpack_from(">i", wire.answer(), 4)[0] for _ in range(5000)] == list(range(5000))


@pytest.mark.parametrize("other_key", [18, 3])
def test_other_requests_among_waiting_ones_keep_their_place_and_their_bytes(
    embedded: object, unique: str, other_key: int
) -> None:
    """A request that waits for the answers before it is not overwritten by what arrives after it."""
    wire = Wire(embedded.bootstrap_servers)  # type: ignore[attr-defined]
    name = struct.pack(">ih", 1, len(unique)) + unique.encode()
    wire.request(3, 1, name)  # which makes the topic
    chance = random.Random(1)
    waiting: deque[int] = deque()
    for number in range(600):
        batch = bytes(encode_batch([NewRecord(None, b"x" * 100, 1) for _ in range(1 + chance.randrange(20))]))
        produce = struct.pack(">hhi", -1, -1, 30_000) + name + struct.pack(">iii", 1, 0, len(batch)) + batch
        if chance.random() < 0.8:
            wire.send_frame(struct.pack(">hhih", 0, 8, number, 4) + b"test" + produce)
        else:
            wire.send_frame(struct.pack(">hhih", other_key, 1, number, 4) + b"test" + (name if other_key == 3 else b""))
        waiting.append(number)
        while len(waiting) > 5 or (waiting and number == 599):
            assert struct.unpack_from(">i", wire.answer(), 4)[0] == waiting.popleft()


def good_batch(**changes: object) -> bytearray:
    return encode_batch([NewRecord(b"k", b"v", round(time.time() * 1000))], **changes)  # type: ignore[arg-type]


def with_bytes(batch: bytearray, at: int, data: bytes) -> bytes:
    batch[at : at + len(data)] = data
    return bytes(batch)


BAD_BATCHES = {
    "wrong checksum": (with_bytes(good_batch(), 17, b"\0\0\0\0"), 2),
    "wrong magic": (with_bytes(good_batch(), 16, b"\x01"), 87),
    "two batches": (bytes(good_batch() + good_batch()), 87),
    "cut off": (bytes(good_batch()[:-3]), 87),
    "no batch": (b"", 87),
    "base offset": (bytes(good_batch(base_offset=7)), 87),
    "control batch": (bytes(good_batch(attributes=0x20)), 87),
    "producer without a sequence": (bytes(good_batch(producer_id=5, producer_epoch=0)), 87),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_gets_kafkas_code_and_the_next_one_is_taken(engine: object, unique: str, name: str) -> None:
    """Every kind of damage has Kafka's own error code; the connection and the log go on. (both engines)"""
    servers = engine.bootstrap_servers  # type: ignore[attr-defined]
    Confluent().produce(servers, unique, [Sent(b"k", b"first")])
    wire = Wire(servers)
    batch, expected = BAD_BATCHES[name]

    code, offset = produce_answer(wire.request(0, 8, produce_body(unique, 0, batch)), unique)
    good, place = produce_answer(wire.request(0, 8, produce_body(unique, 0, bytes(good_batch()))), unique)

    assert (code, offset) == (expected, -1)
    assert (good, place) == (0, 1)


def fetch_body(*topics: str, max_wait_ms: int = 200) -> bytes:
    """A Fetch request, version 4: partition 0 of each from offset 0 on."""
    wanted = [
        struct.pack(">h", len(topic)) + topic.encode() + struct.pack(">iiqi", 1, 0, 0, 100_000) for topic in topics
    ]
    return struct.pack(">iiiibi", -1, max_wait_ms, 1, 1_000_000, 0, len(topics)) + b"".join(wanted)


def test_a_fetch_of_an_unknown_topic_gets_kafkas_code_and_harms_no_other(engine: object, unique: str) -> None:
    """UNKNOWN_TOPIC_OR_PARTITION, alone or before one that is there, on a connection that goes on. (both engines)"""
    servers = engine.bootstrap_servers  # type: ignore[attr-defined]
    Confluent().produce(servers, unique, [Sent(b"k", b"v")])
    wire = Wire(servers)
    absent = "a" * len(unique)

    alone = wire.request(1, 4, fetch_body(absent))
    both = wire.request(1, 4, fetch_body(absent, unique))

    at = 8 + 4 + 4 + 2 + len(absent) + 4
    assert struct.unpack_from(">ih", alone, at) == (0, 3)
    errors = {}
    for topic in (absent, unique):
        place = both.index(topic.encode()) + len(topic)
        errors[topic] = struct.unpack_from(">iihq", both, place)
    assert errors == {absent: (1, 0, 3, -1), unique: (1, 0, 0, 1)}


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "x" * 250, "späte"])
def test_a_topic_name_that_is_no_name_is_refused(engine: object, name: str) -> None:
    """INVALID_TOPIC_EXCEPTION: names become folders. (both engines)"""
    body = (
        struct.pack(">ih", 1, len(name.encode()))
        + name.encode()
        + struct.pack(">ihii", 1, 1, 0, 0)
        + struct.pack(">i?", 5000, False)
    )
    answer = Wire(engine.bootstrap_servers).request(19, 2, body)  # type: ignore[attr-defined]
    (code,) = struct.unpack_from(">h", answer, 8 + 4 + 4 + 2 + len(name.encode()))

    assert code == 17


def test_acks_0_gets_no_answer_and_keeps_its_place(embedded: object, unique: str) -> None:
    """No byte is sent for acks=0; the next request's answer is the next thing to come."""
    servers = embedded.bootstrap_servers  # type: ignore[attr-defined]
    Confluent().produce(servers, unique, [Sent(b"k", b"first")])
    wire = Wire(servers)
    wire.send_frame(frame(0, 8, produce_body(unique, 0, bytes(good_batch()), acks=0)))

    assert struct.unpack_from(">i", wire.request(*API_VERSIONS_0, correlation=99), 4) == (99,)


def test_a_client_that_does_not_read_bounds_the_brokers_memory(broker: BrokerProcess) -> None:
    """S004.2: clients that ask for megabytes and read nothing cost the broker a bounded amount; others go on."""
    servers = broker.bootstrap_servers
    Confluent().produce(servers, "big", [Sent(b"k", os.urandom(900_000)) for _ in range(40)])
    before = broker.resident_bytes()
    name = b"big"
    body = (
        struct.pack(">iiiibih", -1, 0, 1, 50_000_000, 0, 1, len(name))
        + name
        + struct.pack(">iiqi", 1, 0, 0, 50_000_000)
    )
    stuck = [Wire(servers) for _ in range(60)]
    for wire in stuck:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(3):
            wire.send_frame(frame(1, 4, body))
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        assert_serves(servers)

    assert broker.resident_bytes() - before < 300 * 1024 * 1024
    for wire in stuck:
        wire.socket.close()
    assert broker.stop() == 0


def bomb_batch(size_bytes: int) -> bytes:
    """A valid zstd batch of a few KB whose records grow to `size_bytes`."""
    body = compress(4, bytes(size_bytes))
    batch = good_batch(attributes=4)[:HEADER_SIZE] + body
    struct.pack_into(">i", batch, 8, len(batch) - 12)
    struct.pack_into(">I", batch, 17, checksum(batch, 0, len(batch)))
    return bytes(batch)


def test_records_that_grow_without_bound_cost_a_bounded_amount(broker: BrokerProcess) -> None:
    """Where the broker has to look into a batch it reads 100 MiB at most; the batch is said to be bad, nobody else."""
    servers = broker.bootstrap_servers
    admin = AdminClient({"bootstrap.servers": servers})
    topics = [NewTopic("plain", 1), NewTopic("compacted", 1, config={"cleanup.policy": "compact"})]
    for made in admin.create_topics(topics).values():
        made.result(10)
    wire = Wire(servers)
    bomb = bomb_batch(700_000_000)

    assert len(bomb) < 100_000
    assert produce_answer(wire.request(0, 8, produce_body("compacted", 0, bomb)), "compacted")[0] == 87
    assert produce_answer(wire.request(0, 8, produce_body("plain", 0, bomb)), "plain") == (0, 0)
    look_up = struct.pack(">iih", -1, 1, 5) + b"plain" + struct.pack(">iiq", 1, 0, 0)
    answer = wire.request(2, 1, look_up)
    assert struct.unpack_from(">ih", answer, 8 + 4 + 2 + 5 + 4) == (0, 2)
    assert produce_answer(wire.request(0, 8, produce_body("plain", 0, bytes(good_batch()))), "plain") == (0, 1)
    assert broker.peak_resident_bytes() < 400_000_000
    assert broker.stop() == 0


# At the start


def start(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "headwater", "broker", *arguments],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_a_second_broker_on_the_directory_is_refused(broker: BrokerProcess) -> None:
    """The message says who has it and what to do."""
    done = start("--data", str(broker.data), "--listen", "127.0.0.1:0")

    assert done.returncode == 1
    assert f"is in use by process {broker.process.pid}" in done.stderr
    assert "--data" in done.stderr
    assert done.stdout == ""


def test_a_port_in_use_is_said(broker: BrokerProcess, tmp_path: Path) -> None:
    """... with what to do about it, and no traceback."""
    done = start("--data", str(tmp_path / "other"), "--listen", broker.bootstrap_servers)

    assert done.returncode == 1
    assert "can't listen" in done.stderr
    assert "--listen" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("log.retention.hour=1", "Did you mean 'log.retention.hours'?"),
        ("num.io.threads=8", "unknown broker config"),
        ("listeners=PLAINTEXT://:9092", "use --listen"),
        ("num.partitions=many", "of type INT"),
        ("num.partitions=0", "at least 1"),
        ("nonsense", "NAME=VALUE"),
    ],
)
def test_a_config_that_can_not_be_used_is_said(tmp_path: Path, setting: str, says: str) -> None:
    """No option is read and ignored: an unknown one is an error that suggests the nearest."""
    done = start("--data", str(tmp_path / "d"), "--set", setting)

    assert done.returncode == 1
    assert says in done.stderr


def test_a_directory_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    """... with what to do, and no traceback."""
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        done = start("--data", str(disk / "data"), "--listen", "127.0.0.1:0")

    assert done.returncode == 1
    assert "can't be used: Read-only file system" in done.stderr
    assert "--data" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_refuses_writes_and_serves_reads(tmp_path: Path) -> None:
    """KAFKA_STORAGE_ERROR while it is full, on a real file system; reads go on; nothing acknowledged is lost."""
    with mounted(tmp_path / "disk", "size=3m") as disk, BrokerProcess.start(disk / "data") as broker:
        admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
        assert admin.list_topics("full", 10) is not None
        wire = Wire(broker.bootstrap_servers)
        batch = bytes(encode_batch([NewRecord(b"k", os.urandom(200_000), round(time.time() * 1000))]))
        codes = [produce_answer(wire.request(0, 8, produce_body("full", 0, batch)), "full")[0] for _ in range(30)]
        good = codes.index(56)
        assert codes == [0] * good + [56] * (30 - good)
        found = Confluent().consume(broker.bootstrap_servers, "full", good)
        assert [record.offset for record in found] == list(range(good))
        assert broker.process.poll() is None
        broker.kill()

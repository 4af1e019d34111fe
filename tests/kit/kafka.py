"""Apache Kafka, the real one: a single node or three, KRaft, on free ports of the loopback address.

The first start on a machine formats with StorageTool, keeps `bootstrap.checkpoint`, and makes a class-data archive; the
later ones need neither and take about a second.
"""

import base64
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from tests.kit.install import KAFKA_HOME
from tests.kit.ports import free_ports
from tests.kit.require import unavailable

TEST_FLAGS = ["-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]  # for tests, never in a benchmark
START_SECONDS = 120.0
ARCHIVE = KAFKA_HOME / "k.jsa"
CHECKPOINT = KAFKA_HOME / "bootstrap.checkpoint"


def java(main_class: str, *arguments: str, flags: list[str] | None = None) -> list[str]:
    """The command line for a class of Kafka's."""
    if not shutil.which("java") or not (KAFKA_HOME / "log4j2.properties").exists():
        unavailable("Apache Kafka", "run `make test`, which installs it through Maven, or install Java 17 and Maven")
    return [
        "java",
        *(TEST_FLAGS if flags is None else flags),
        f"-Dlog4j2.configurationFile={KAFKA_HOME / 'log4j2.properties'}",
        "-cp",
        f"{KAFKA_HOME / 'lib'}/*",
        main_class,
        *arguments,
    ]


class KafkaNode:
    def __init__(self, node_id: int, port: int, controller_port: int, home: Path) -> None:
        self.node_id = node_id
        self.port = port
        self.controller_port = controller_port
        self.home = home
        self.data = home / "data"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


class KafkaCluster:
    """One or three nodes. `stop` ends exactly the processes that were started here."""

    def __init__(
        self, nodes: int = 1, settings: Mapping[str, str] | None = None, flags: list[str] | None = None
    ) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="headwater-kafka-"))
        self._settings = dict(settings or {})
        self._flags = flags
        self._cluster_id = _random_id()
        ports = free_ports(2 * nodes)
        self.nodes = [KafkaNode(i + 1, ports[2 * i], ports[2 * i + 1], self._home / str(i + 1)) for i in range(nodes)]

    @property
    def bootstrap_servers(self) -> str:
        return ",".join(node.address for node in self.nodes)

    def start(self) -> "KafkaCluster":
        for node in self.nodes:
            self._format(node)
            self.start_node(node)
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Until every node names every other."""
        deadline = time.monotonic() + START_SECONDS
        for node in self.nodes:
            while brokers_named_by(node.port) < len(self.nodes):
                assert node.process is not None
                if node.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Kafka did not start:\n{(node.home / 'out').read_text()[-4000:]}")
                time.sleep(0.03)

    def start_node(self, node: KafkaNode) -> None:
        flags = TEST_FLAGS + ([f"-XX:SharedArchiveFile={ARCHIVE}"] if ARCHIVE.exists() else [])
        command = java("kafka.Kafka", str(node.home / "server.properties"), flags=self._flags or flags)
        with (node.home / "out").open("ab") as out:
            node.process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def kill_node(self, node: KafkaNode) -> None:
        assert node.process is not None
        node.process.kill()
        node.process.wait()

    def stop(self) -> None:
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                # three nodes wait for a quorum that is going away
                node.process.send_signal(signal.SIGTERM if len(self.nodes) == 1 else signal.SIGKILL)
        for node in self.nodes:
            if node.process is not None:
                try:
                    node.process.wait(30)
                except subprocess.TimeoutExpired:
                    node.process.kill()
                    node.process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def _format(self, node: KafkaNode) -> None:
        node.data.mkdir(parents=True)
        (node.home / "server.properties").write_text(self._properties(node))
        if not CHECKPOINT.exists():
            subprocess.run(
                java("kafka.tools.StorageTool", "format", f"--cluster-id={self._cluster_id}", "-c",
                     str(node.home / "server.properties")),
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            shutil.copy(node.data / "bootstrap.checkpoint", CHECKPOINT)
            return
        shutil.copy(CHECKPOINT, node.data / "bootstrap.checkpoint")
        identity = {
            "version": "1",
            "cluster.id": self._cluster_id,
            "node.id": node.node_id,
            "directory.id": _random_id(),
        }
        (node.data / "meta.properties").write_text("".join(f"{name}={value}\n" for name, value in identity.items()))

    def _properties(self, node: KafkaNode) -> str:
        replicas = min(len(self.nodes), 3)
        minimum = 2 if replicas == 3 else 1
        voters = ",".join(f"{each.node_id}@127.0.0.1:{each.controller_port}" for each in self.nodes)
        values = {
            "process.roles": "broker,controller",
            "node.id": node.node_id,
            "broker.rack": f"rack-{node.node_id}",
            "listeners": f"PLAINTEXT://{node.address},CONTROLLER://127.0.0.1:{node.controller_port}",
            "advertised.listeners": f"PLAINTEXT://{node.address}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "controller.quorum.voters": voters,
            "log.dirs": node.data,
            "group.initial.rebalance.delay.ms": 0,
            "log.cleaner.dedupe.buffer.size": 2097152,
            "auto.create.topics.enable": "true",
            "default.replication.factor": replicas,
            "min.insync.replicas": minimum,
            "broker.session.timeout.ms": 2000,
            "broker.heartbeat.interval.ms": 300,
            "controller.quorum.election.timeout.ms": 500,
            "controller.quorum.fetch.timeout.ms": 1000,
            "controller.quorum.election.backoff.max.ms": 300,
            "group.min.session.timeout.ms": 500,
        }
        for name in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic"):
            values[f"{name}.num.partitions"] = 1
            values[f"{name}.replication.factor"] = replicas
        for name in ("transaction.state.log", "share.coordinator.state.topic"):
            values[f"{name}.min.isr"] = minimum
        values.update(self._settings)
        return "".join(f"{name}={value}\n" for name, value in values.items())


def make_archive() -> None:
    """Kafka starts in half the time with a class-data archive. Made once a machine; left out where it can't be."""
    if ARCHIVE.exists() or not CHECKPOINT.exists():
        return
    cluster = KafkaCluster(flags=[*TEST_FLAGS, f"-XX:ArchiveClassesAtExit={ARCHIVE}"])
    try:
        cluster.start()
    finally:
        cluster.stop()


def _random_id() -> str:
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()


def brokers_named_by(port: int) -> int:
    """How many brokers a Metadata answer (version 1) names; 0 while there is none."""
    request = struct.pack(">hhih", 3, 1, 1, -1) + struct.pack(">i", 0)
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.settimeout(2)
            connection.sendall(struct.pack(">i", len(request)) + request)
            answer = b""
            while len(answer) < 12:
                more = connection.recv(65536)
                if not more:
                    return 0
                answer += more
            return int(struct.unpack_from(">i", answer, 8)[0])
    except OSError:
        return 0

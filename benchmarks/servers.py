"""The two brokers under test, each started as its users start it, with the operating system's account of it."""

import os
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path

from tests.kit.kafka import KafkaCluster, brokers_named_by

from headwater.testing.broker import BrokerProcess

# What kafka-server-start.sh gives the JVM; no class-data archive.
KAFKA_FLAGS = [
    "-Xmx1G", "-Xms1G", "-server", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent", "-XX:MaxInlineLevel=15", "-Djava.awt.headless=true",
]  # fmt: skip
NO_SYNC = {"log.flush.interval.messages": str((1 << 63) - 1)}
SYNC = {"log.flush.interval.messages": "1"}
TICKS = os.sysconf("SC_CLK_TCK")


class Server(ABC):
    """A broker and its process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ""
        self.pid = 0
        self.start_seconds = 0.0

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_mb(self) -> float:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    @abstractmethod
    def stop(self) -> None:
        """End the process, and remove what it left."""


class Headwater(Server):
    def __init__(self, name: str, settings: dict[str, str]) -> None:
        super().__init__(name)
        self._home = Path(tempfile.mkdtemp(prefix="headwater-bench-"))
        self._settings = settings
        self.begin()

    def begin(self) -> None:
        started = time.perf_counter()
        self.process = BrokerProcess.start(self._home / "data", self._settings)
        self.address = self.process.bootstrap_servers
        while not brokers_named_by(int(self.address.rpartition(":")[2])):
            time.sleep(0.002)
        self.start_seconds = time.perf_counter() - started
        self.pid = self.process.process.pid

    def crash(self) -> None:
        self.process.kill()

    def end(self) -> None:
        self.process.stop()

    def stop(self) -> None:
        self.end()
        shutil.rmtree(self._home, ignore_errors=True)


class Kafka(Server):
    def __init__(self, name: str, settings: dict[str, str]) -> None:
        super().__init__(name)
        started = time.perf_counter()
        # the shipped defaults, but for the addresses
        self._cluster = KafkaCluster(
            settings={**settings, "broker.session.timeout.ms": "9000"}, flags=KAFKA_FLAGS
        ).start()
        self.start_seconds = time.perf_counter() - started
        self._note()

    def _note(self) -> None:
        node = self._cluster.nodes[0]
        assert node.process is not None
        self.address, self.pid = node.address, node.process.pid

    def begin(self) -> None:
        started = time.perf_counter()
        self._cluster.start_node(self._cluster.nodes[0])
        self._cluster.wait_ready()
        self.start_seconds = time.perf_counter() - started
        self._note()

    def crash(self) -> None:
        self._cluster.kill_node(self._cluster.nodes[0])

    def end(self) -> None:
        process = self._cluster.nodes[0].process
        assert process is not None
        process.terminate()
        process.wait(60)

    def stop(self) -> None:
        self._cluster.stop()


def build_load_generator() -> Path:
    """Compile load.c. Needs a C compiler."""
    source = Path(__file__).with_name("load.c")
    program = Path(tempfile.mkdtemp(prefix="headwater-load-")) / "load"
    subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
    return program

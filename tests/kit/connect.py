"""Kafka Connect, one standalone worker with Debezium's PostgreSQL connector and its outbox router."""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.kit.install import CONNECT_HOME
from tests.kit.ports import free_ports
from tests.kit.require import unavailable

FLAGS = ["-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]


class DebeziumWorker:
    """Reads the slot `debezium` of a database, by the publication of that name: both are to be there before the first row
    that counts, then it doesn't matter when the worker is ready."""

    def __init__(self, bootstrap_servers: str, database_port: int, database: str, router: Mapping[str, str]) -> None:
        """router: the EventRouter's properties."""
        if not shutil.which("java") or not (CONNECT_HOME / "log4j2.properties").exists():
            unavailable("Debezium", "run `make test`, which installs it through Maven")
        self._home = Path(tempfile.mkdtemp(prefix="headwater-connect-"))
        worker = {
            "bootstrap.servers": bootstrap_servers,
            "listeners": f"http://127.0.0.1:{free_ports(1)[0]}",  # it can't be switched off
            "key.converter": "org.apache.kafka.connect.storage.StringConverter",
            "value.converter": "org.apache.kafka.connect.storage.StringConverter",
            "header.converter": "org.apache.kafka.connect.storage.StringConverter",
            "offset.storage.file.filename": str(self._home / "offsets"),
            "offset.flush.interval.ms": "200",
            "plugin.discovery": "service_load",
        }
        connector = {
            "name": "outbox",
            "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
            "tasks.max": "1",
            "database.hostname": "127.0.0.1",
            "database.port": str(database_port),
            "database.user": "postgres",
            "database.password": "x",
            "database.dbname": database,
            "topic.prefix": "debezium",
            "plugin.name": "pgoutput",
            "slot.name": "debezium",
            "publication.name": "debezium",
            "publication.autocreate.mode": "disabled",
            "table.include.list": "public.outbox",
            "snapshot.mode": "no_data",
            "tombstones.on.delete": "false",
            "poll.interval.ms": "10",
            "extended.headers.enabled": "false",
            "transforms": "outbox",
            "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter",
            **{f"transforms.outbox.{name}": value for name, value in router.items()},
        }
        paths = [self._write("worker", worker), self._write("connector", connector)]
        command = ["java", *FLAGS, f"-Dlog4j2.configurationFile={CONNECT_HOME / 'log4j2.properties'}",
                   "-cp", f"{CONNECT_HOME / 'lib'}/*", "org.apache.kafka.connect.cli.ConnectStandalone", *paths]  # fmt: skip
        with (self._home / "out").open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, cwd=self._home, start_new_session=True)

    def _write(self, name: str, properties: Mapping[str, str]) -> str:
        path = self._home / f"{name}.properties"
        path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        return str(path)

    def said(self) -> str:
        return (self._home / "out").read_text()[-4000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.said())
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

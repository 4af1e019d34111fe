"""Engines: each behaviour that a user may rely on is tested on the embedded broker and on Apache Kafka, by one suite."""

import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from hypothesis import settings

from headwater.testing.broker import BrokerProcess
from tests.kit.kafka import KafkaCluster, make_archive
from tests.kit.postgres import Postgres

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")

ENGINES = ("embedded", "kafka")

TEST_SETTINGS = {"group.min.session.timeout.ms": "500"}


class Engine(NamedTuple):
    name: str
    bootstrap_servers: str

    @property
    def is_embedded(self) -> bool:
        return self.name == "embedded"


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with BrokerProcess.start(tmp_path_factory.mktemp("broker") / "data", TEST_SETTINGS) as broker:
        yield Engine("embedded", broker.bootstrap_servers)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Engine]:
    make_archive()
    cluster = KafkaCluster().start()
    yield Engine("kafka", cluster.bootstrap_servers)
    cluster.stop()


@pytest.fixture(scope="session")
def kafka3() -> Iterator[KafkaCluster]:
    make_archive()
    cluster = KafkaCluster(nodes=3).start()
    yield cluster
    cluster.stop()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every test with it runs twice."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Engine)
    return found


@pytest.fixture
def unique() -> str:
    """A name that no other test uses."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker of the test's own."""
    with BrokerProcess.start(tmp_path / "data", TEST_SETTINGS) as process:
        yield process


SERVER_FIXTURES = {"own_engine", "embedded", "kafka", "kafka3", "engine", "broker", "postgres", "database_url"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts a process is marked as such, so that `make check` can leave it out."""
    for item in items:
        if SERVER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres().start()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://postgres@127.0.0.1:{server.port}/{name}"


class Evidence:
    """Writes what a soak run has seen to docs/evidence: a table with commit, date, seeds and counts."""

    folder = Path(__file__).parent.parent / "docs" / "evidence"

    def write(self, name: str, row: dict[str, object]) -> None:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=self.folder.parent
        ).stdout.strip()
        row = {"commit": commit, "date": time.strftime("%Y-%m-%d"), **row}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.md"
        if not path.exists():
            path.write_text(f"# {name}\n\n| {' | '.join(row)} |\n|{'---|' * len(row)}\n")
        with path.open("a") as file:
            file.write(f"| {' | '.join(map(str, row.values()))} |\n")


@pytest.fixture
def evidence() -> Evidence:
    return Evidence()

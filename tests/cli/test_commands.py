"""The command line: what each command prints, that it ends well, and that errors say what to do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headwater.testing.broker import BrokerProcess
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.registry import RestClient

pytestmark = pytest.mark.server


def headwater(
    *arguments: str, servers: str | None = None, stdin: str | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "headwater", *arguments]
    if servers is not None:
        command += ["--bootstrap-servers", servers]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


def out(*arguments: str, servers: str, stdin: str | None = None) -> str:
    done = headwater(*arguments, servers=servers, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_topic_through_the_command_line(engine: Engine, unique: str) -> None:
    """create, produce, consume, describe, alter, delete; each with --json. (both engines)"""
    servers = engine.bootstrap_servers
    out("topics", "create", unique, "--partitions", "2", "--config", "retention.ms=777000", servers=servers)
    text = out("produce", unique, "--key-separator", "=", servers=servers, stdin="a=1\nb=2\na=3\n")
    assert "produced 3 records" in text

    shown = out("consume", unique, "--keys", servers=servers)
    records = [json.loads(line) for line in out("consume", unique, "--json", servers=servers).splitlines()]
    assert sorted(shown.split()) == ["1", "2", "3", "a", "a", "b"]
    assert [r["value"] for r in records if r["key"] == "a"] == ["1", "3"]
    described = json.loads(out("topics", "describe", unique, "--json", servers=servers))
    assert described["configs"]["retention.ms"] == "777000"
    assert sum(each["end"] - each["start"] for each in described["partitions"]) == 3

    out("topics", "alter", unique, "--partitions", "3", "--unset", "retention.ms", servers=servers)
    wait_until(
        lambda: len(json.loads(out("topics", "describe", unique, "--json", servers=servers))["partitions"]) == 3,
        "3 partitions",
    )
    assert unique in out("topics", "list", servers=servers)
    out("topics", "delete", unique, "--yes", servers=servers)
    wait_until(lambda: unique not in out("topics", "list", servers=servers), "the topic to be gone")


def test_what_consume_prints_produce_writes_again(engine: Engine, unique: str) -> None:
    """JSON lines are lossless: bytes that are no text, tombstones, headers that repeat. (both engines)"""
    from confluent_kafka import Producer

    servers = engine.bootstrap_servers
    producer = Producer({"bootstrap.servers": servers})
    producer.produce(unique, b'{"price": 1.10}', b"k", headers=[("h", b"1"), ("h", b"2")])
    producer.produce(unique, b"\xff\x00", None, headers=[("b", b"\xfe")])
    producer.produce(unique, None, b"gone")
    producer.flush(10)
    copied = f"{unique}.copy"
    lines = out("consume", unique, "--json", servers=servers)
    out("topics", "create", copied, servers=servers)
    out("produce", copied, "--json-lines", servers=servers, stdin=lines)

    def content(topic: str) -> list[tuple[object, ...]]:
        shown = out("consume", topic, "--json", servers=servers).splitlines()
        return [(r["key"], r["value"], r["headers"]) for r in map(json.loads, shown)]

    assert content(copied) == content(unique)


def test_consume_from_a_place_or_a_time(engine: Engine, unique: str) -> None:
    """--from takes offsets, distances from the end, times; -n stops. (both engines)"""
    servers = engine.bootstrap_servers
    out("topics", "create", unique, servers=servers)
    out("produce", unique, servers=servers, stdin="".join(f"{i}\n" for i in range(10)))

    assert out("consume", unique, "--from", "7", servers=servers).split() == ["7", "8", "9"]
    assert out("consume", unique, "--from", "-2", servers=servers).split() == ["8", "9"]
    assert out("consume", unique, "-n", "3", servers=servers).split() == ["0", "1", "2"]
    assert out("consume", unique, "--from", "2020-01-01", servers=servers).split() == [str(i) for i in range(10)]
    assert out("consume", unique, "--from", "latest", servers=servers) == ""


def test_a_group_is_listed_described_reset_and_deleted(engine: Engine, unique: str) -> None:
    """S002.11: the plan first; --execute does it; lag is in the description. (both engines)"""
    from tests.kit.clients import Confluent, Sent

    servers = engine.bootstrap_servers
    Confluent().produce(servers, unique, [Sent(b"k", b"%d" % i) for i in range(10)])
    Confluent().consume(servers, unique, 4, group=unique)
    before = json.loads(out("groups", "describe", unique, "--json", servers=servers))["partitions"][0]

    plan = out("groups", "reset", unique, "--topic", unique, "--to", "2", servers=servers)
    unchanged = json.loads(out("groups", "describe", unique, "--json", servers=servers))["partitions"][0]
    out("groups", "reset", unique, "--topic", unique, "--to", "2", "--execute", servers=servers)
    after = json.loads(out("groups", "describe", unique, "--json", servers=servers))["partitions"][0]

    assert "dry run" in plan
    assert unchanged == before
    assert (after["committed"], after["lag"]) == (2, 8)
    assert unique in out("groups", "list", servers=servers)
    out("groups", "delete", unique, "--yes", servers=servers)
    assert unique not in out("groups", "list", servers=servers)


ERRORS = [
    (("topics", "describe", "nope"), "nope"),
    (("topics", "create", "a/b"), "Topic name is invalid"),
    (("topics", "create", "x", "--partitions", "-7"), "at least 1 partition"),
    (("topics", "alter", "nope"), "nothing to change"),
    (("groups", "describe", "nope"), "headwater groups list"),
    (("groups", "reset", "nope", "--topic", "t", "--to", "earliest"), "there is no"),
    (("consume", "nope"), "headwater topics list"),
]


@pytest.mark.parametrize(("arguments", "says"), ERRORS)
def test_an_error_is_one_message_and_exit_code_1(embedded: Engine, arguments: tuple[str, ...], says: str) -> None:
    """What was wrong, and what to do; never a traceback."""
    done = headwater(*arguments, servers=embedded.bootstrap_servers)

    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_broker_the_message_says_how_to_get_one() -> None:
    """The first thing that a new user meets."""
    done = headwater("topics", "list", servers="127.0.0.1:1")

    assert done.returncode == 1
    assert "headwater up" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("target", "environment", "says"),
    [
        ("nonsense", {}, "MODULE:NAME"),
        ("no.such.module:app", {}, "there is no module no"),
        ("json:loads", {}, "has no App named"),
        ("examples.shop.warehouse:app", {"HEADWATER_NONSENSE": "1"}, "HEADWATER_NONSENSE is not known"),
        ("examples.shop.warehouse:app", {"HEADWATER_ALERT_WEBHOOK": "localhost:80"}, "begins with http"),
        ("examples.shop.warehouse:app", {"HEADWATER_DATABASE_URL": "oracle://x"}, "database"),
        (
            "examples.shop.warehouse:app",
            {"HEADWATER_DATABASE_URL": "sqlite:////tmp/x", "HEADWATER_BOOTSTRAP_SERVERS": "127.0.0.1:1"},
            "no broker",
        ),
    ],
)
def test_an_application_that_can_not_start_says_why(target: str, environment: dict[str, str], says: str) -> None:
    """One message; exit code 1 when it can't start now, 2 when it can't be as it is declared."""
    done = headwater("run", target, **environment)

    assert done.returncode == (1 if says == "no broker" else 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


HAPPENED = json.dumps(
    {
        "eventId": "1", "eventType": "Happened", "eventVersion": "v1", "timestamp": "2026-01-01T00:00:00Z", "source": "t",
        "correlationId": "c", "causationId": None, "data": {"name": "n"}, "metadata": {},
    }
)  # fmt: skip

APP = """
import os, time
from headwater import App, Event, Topic

class Happened(Event):
    name: str

topic = Topic("happenings", key="name", events=[Happened], partitions=2)
app = App("app", topics=[topic])

@app.handler(topic, group="watchers")
def watch(event: Happened) -> None:
    print("saw", event.name, flush=True)
    time.sleep(float(os.environ.get("SLEEP", "0")))
"""


def start_up(
    folder: Path, *arguments: str, registry: str = "--no-registry", **environment: str
) -> "subprocess.Popen[str]":
    (folder / "myapp.py").write_text(APP)
    command = [
        sys.executable,
        "-m",
        "headwater",
        "up",
        "--data",
        str(folder / "d"),
        "--port",
        "0",
        registry,
        *arguments,
    ]
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder), **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def status(folder: Path) -> dict[str, dict[str, object]]:
    done = headwater("up", "--data", str(folder / "d"), "status", "--json")
    if done.returncode:
        return {}
    return {each["name"]: each for each in json.loads(done.stdout)["processes"]}


def test_up_supervises_restarts_stops_and_starts(tmp_path: Path) -> None:
    """One command starts everything; what dies is started again; stop and start by name; SIGTERM ends it with 0."""
    up = start_up(tmp_path, "--app", "myapp:app", registry="--registry-port=0")
    try:

        def are_all_up() -> bool:
            found = status(tmp_path)
            return all(each["running"] for each in found.values()) and bool(found.get("registry", {}).get("address"))

        wait_until(are_all_up, "all three")
        first = status(tmp_path)
        assert set(first) == {"broker", "registry", "myapp"}
        assert RestClient(str(first["registry"]["address"])).register("s", '"int"').body == {"id": 1}
        os.kill(int(str(first["registry"]["pid"])), signal.SIGKILL)
        os.kill(int(str(first["myapp"]["pid"])), signal.SIGKILL)
        wait_until(
            lambda: status(tmp_path)["myapp"]["running"] and status(tmp_path)["myapp"]["pid"] != first["myapp"]["pid"],
            "a new process",
        )
        os.kill(int(str(first["broker"]["pid"])), signal.SIGKILL)
        wait_until(lambda: status(tmp_path)["broker"]["pid"] not in (None, first["broker"]["pid"]), "a new broker")
        assert status(tmp_path)["broker"]["address"] == first["broker"]["address"]
        wait_until(
            lambda: status(tmp_path)["registry"]["pid"] not in (None, first["registry"]["pid"]), "a new registry"
        )
        assert status(tmp_path)["registry"]["address"] == first["registry"]["address"]
        control = ("up", "--data", str(tmp_path / "d"))
        both = ("myapp", "registry")
        assert headwater(*control, "stop", *both).returncode == 0
        assert not any(status(tmp_path)[name]["running"] for name in both)
        assert headwater(*control, "start", *both).returncode == 0
        wait_until(lambda: all(status(tmp_path)[name]["running"] for name in both), "their return")
        assert "nothing here is called 'nobody'" in headwater(*control, "stop", "myapp", "nobody").stderr
        assert status(tmp_path)["myapp"]["running"]
    finally:
        up.send_signal(signal.SIGTERM)
        _, errors = up.communicate(timeout=60)
    assert up.returncode == 0, errors


def test_what_up_starts_again_has_its_partitions_at_once(tmp_path: Path) -> None:
    """S000.9: the process that takes the place of a killed one is the same member of its groups: nobody waits for a
    session to end."""
    up = start_up(tmp_path, "--app", "myapp:app", HEADWATER_KAFKA_SESSION_TIMEOUT_MS="45000")
    try:
        wait_until(lambda: bool(status(tmp_path).get("myapp", {}).get("running")), "the application")
        servers = str(status(tmp_path)["broker"]["address"])

        def committed() -> int:
            done = headwater("groups", "describe", "watchers", "--json", servers=servers)
            partitions = json.loads(done.stdout)["partitions"] if done.returncode == 0 else []
            return sum(each["committed"] or 0 for each in partitions)

        wait_until(lambda: "happenings" in headwater("topics", "list", servers=servers).stdout, "its topic")
        out("produce", "happenings", "--key", "n", "--value", HAPPENED, servers=servers)
        wait_until(lambda: committed() == 1, "the first event")
        first = status(tmp_path)["myapp"]["pid"]
        os.kill(int(str(first)), signal.SIGKILL)
        out("produce", "happenings", "--key", "n", "--value", HAPPENED, servers=servers)
        wait_until(lambda: committed() == 2, "the second one, well before the session's end", 30)
    finally:
        up.send_signal(signal.SIGTERM)
        up.communicate(timeout=60)


def test_a_port_that_is_given_counts_more_than_the_environment(tmp_path: Path) -> None:
    """Somebody who has exported an address for the other commands gets the broker that they ask for."""
    up = start_up(tmp_path, HEADWATER_BOOTSTRAP_SERVERS="127.0.0.1:1")
    try:
        wait_until(lambda: bool(status(tmp_path).get("broker", {}).get("running")), "the broker")
    finally:
        up.send_signal(signal.SIGTERM)
        printed, _ = up.communicate(timeout=60)
    assert "HEADWATER_BOOTSTRAP_SERVERS=127.0.0.1:1" in printed


def test_up_does_not_start_again_what_no_start_can_help(tmp_path: Path) -> None:
    """An application that isn't there, or is declared wrongly, is said once; the others run."""
    up = start_up(tmp_path, "--app", "myapp:app", "--app", "nosuchmodule:app")
    try:
        wait_until(lambda: status(tmp_path).get("nosuchmodule", {}).get("state") == "stopped", "the end of it")
        wait_until(lambda: bool(status(tmp_path)["myapp"]["running"]), "the other one")
    finally:
        up.send_signal(signal.SIGTERM)
        out, errors = up.communicate(timeout=60)
    assert errors.count("there is no module nosuchmodule") == 1
    assert "did not start" in out


def test_up_says_that_the_port_is_in_use_and_ends(broker: BrokerProcess, tmp_path: Path) -> None:
    """No loop of restarts for what can't get better by itself."""
    port = broker.bootstrap_servers.rpartition(":")[2]
    done = headwater("up", "--data", str(tmp_path / "d"), "--port", port)

    assert done.returncode == 1
    assert "can't listen" in done.stderr


def test_an_application_that_prints_much_never_blocks(tmp_path: Path) -> None:
    """What applications print goes to the terminal of `up`; SIGTERM ends it, whatever they are at."""
    up = start_up(tmp_path, "--app", "myapp:app")
    try:
        wait_until(lambda: bool(status(tmp_path).get("myapp", {}).get("running")), "the application")
        servers = str(status(tmp_path)["broker"]["address"])
        wait_until(lambda: "happenings" in headwater("topics", "list", servers=servers).stdout, "its topic")
    finally:
        up.send_signal(signal.SIGTERM)
        up.communicate(timeout=60)
    assert up.returncode == 0


def test_sigterm_with_the_broker_away_ends_in_time(tmp_path: Path) -> None:
    """An application whose broker is gone stops within its budget, with exit code 0."""
    broker = BrokerProcess.start(tmp_path / "data")
    (tmp_path / "myapp.py").write_text(APP)
    environment = {
        **os.environ,
        "HEADWATER_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "HEADWATER_DATABASE_URL": f"sqlite:///{tmp_path / 'x.db'}",
    }
    app = subprocess.Popen(
        [sys.executable, "-m", "headwater", "run", "myapp:app"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(
        lambda: "happenings" in headwater("topics", "list", servers=broker.bootstrap_servers).stdout, "its topic"
    )
    out("produce", "happenings", "--key", "n", "--value", HAPPENED, servers=broker.bootstrap_servers)
    wait_until(lambda: "watchers" in headwater("groups", "list", servers=broker.bootstrap_servers).stdout, "its group")
    broker.kill()
    started = time.monotonic()
    app.send_signal(signal.SIGTERM)
    _, errors = app.communicate(timeout=60)

    assert app.returncode == 0, errors
    assert time.monotonic() - started < 40


def test_a_long_sync_handler_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    """It has its 20 seconds; then it is cut off, unsettled, and the process ends."""
    broker = BrokerProcess.start(tmp_path / "data")
    (tmp_path / "myapp.py").write_text(APP)
    environment = {**os.environ, "HEADWATER_BOOTSTRAP_SERVERS": broker.bootstrap_servers, "SLEEP": "300"}
    app = subprocess.Popen(
        [sys.executable, "-m", "headwater", "run", "myapp:app"], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_until(
        lambda: "happenings" in headwater("topics", "list", servers=broker.bootstrap_servers).stdout, "its topic"
    )
    out("produce", "happenings", "--key", "n", "--value", HAPPENED, servers=broker.bootstrap_servers)
    assert app.stdout is not None
    assert app.stdout.readline() == "saw n\n"
    app.send_signal(signal.SIGTERM)

    assert app.wait(45) == 0
    assert broker.stop() == 0


def test_the_brokers_process_loads_nothing_of_the_application_half() -> None:
    """The broker starts in a fraction of a second: no client, no SQLAlchemy, no command line library."""
    code = (
        "import sys; sys.argv = ['headwater', 'broker', '--help']\n"
        "import headwater.broker.server, headwater.cli.broker, headwater.cli.main\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    for heavy in (
        "confluent_kafka",
        "sqlalchemy",
        "typer",
        "rich",
        "starlette",
        "uvicorn",
        "pydantic",
        "kio",
        "hypothesis",
    ):
        assert f"'{heavy}'" not in loaded

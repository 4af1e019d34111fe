"""Bounded jobs: handlers over what a topic has, then exit 0. On both engines."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

from confluent_kafka import Producer

from headwater.event.codec import encode
from headwater.event.envelope import Cause
from headwater.kafka.admin import KafkaAdmin
from headwater.operations.lag import partition_rows
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.running import settings_for
from tests.runtime.test_app import Placed, publish_all, topic_for

PROGRAM = """
    import os
    from pathlib import Path
    from headwater import App, Event, Retry, Topic

    class Placed(Event):
        order_id: str
        number: int

    topic = Topic(os.environ["TOPIC"], key="order_id", events=[Placed], partitions=3)
    app = App("job")
    tried = set()

    @app.handler(topic, group=os.environ["TOPIC"], retry=Retry(3, "1200ms"))
    async def handle(event: Placed) -> None:
        if event.number % 50 == 7 and event.number not in tried:
            tried.add(event.number)
            raise RuntimeError("once")
        if event.number == 13:
            raise RuntimeError("always")
        with Path(os.environ["OUT"]).open("a") as out:
            out.write(f"{event.number}\\n")
"""


def job(engine: Engine, topic: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    (folder / "job_app.py").write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "TOPIC": topic, "OUT": str(folder / "out"),
                   "HEADWATER_BOOTSTRAP_SERVERS": engine.bootstrap_servers}  # fmt: skip
    command = [sys.executable, "-m", "headwater", "run", "--until-now", "job_app:app"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def handled(folder: Path) -> list[int]:
    return sorted(int(line) for line in (folder / "out").read_text().split())


def test_a_job_handles_what_is_there_and_ends(engine: Engine, unique: str, tmp_path: Path) -> None:
    """S001.12: all that the topic has when it starts, retries and a dead letter among it, and exit code 0; the next job goes on
    where it ended. (both engines)"""
    topic = topic_for(unique)
    publish_all(engine, topic, [Placed(f"o{i % 20}", i) for i in range(200)])

    first = job(engine, unique, tmp_path)
    assert first.returncode == 0, first.stderr
    assert handled(tmp_path) == [i for i in range(200) if i != 13]

    publish_all(engine, topic, [Placed(f"o{i % 20}", i) for i in range(200, 230)])
    second = job(engine, unique, tmp_path)
    assert second.returncode == 0, second.stderr
    assert handled(tmp_path) == [i for i in range(230) if i != 13]
    assert job(engine, unique, tmp_path).returncode == 0, "nothing is there to do"


def test_a_job_ends_where_a_transaction_does(kafka: Engine, unique: str, tmp_path: Path) -> None:
    """S001.12: the marker behind the last record, and records that were aborted, are nothing to be handled."""
    KafkaAdmin(settings_for(kafka)).create_topic(unique, 3)
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": unique})
    producer.init_transactions()
    for commits in (True, False):
        producer.begin_transaction()
        for number in range(100, 130):
            encoded = encode(Placed(f"o{number}", number), "p", Cause("c", None))
            producer.produce(unique, encoded.value, f"o{number}", headers=encoded.headers)
        producer.flush()
        producer.commit_transaction() if commits else producer.abort_transaction()
    done = job(kafka, unique, tmp_path)
    assert done.returncode == 0, done.stderr
    assert handled(tmp_path) == list(range(100, 130))


def test_a_job_ends_although_more_comes(embedded: Engine, unique: str, tmp_path: Path) -> None:
    """S001.12: now is when it starts: a topic that never ends doesn't hold it up."""
    topic = topic_for(unique)
    publish_all(embedded, topic, [Placed(f"o{i % 20}", i) for i in range(100, 150)])
    stop = threading.Event()

    def go_on() -> None:
        number = 1_000
        while not stop.is_set():
            publish_all(embedded, topic, [Placed("o1", number + i) for i in range(20)])
            number += 20

    traffic = threading.Thread(target=go_on)
    traffic.start()
    try:
        done = job(embedded, unique, tmp_path)
    finally:
        stop.set()
        traffic.join()
    assert done.returncode == 0, done.stderr
    assert set(handled(tmp_path)) >= set(range(100, 150))


def test_a_job_that_is_stopped_before_its_end_does_not_say_it_is_done(
    embedded: Engine, unique: str, tmp_path: Path
) -> None:
    """SIGTERM: exit code 1, so that a scheduler starts it again."""
    topic = topic_for(unique)
    publish_all(embedded, topic, [Placed("o1", 13)])  # its handler fails and fails
    (tmp_path / "job_app.py").write_text(textwrap.dedent(PROGRAM).replace('"1200ms"', '"60s"'))
    environment = {**os.environ, "TOPIC": unique, "OUT": str(tmp_path / "out"),
                   "HEADWATER_BOOTSTRAP_SERVERS": embedded.bootstrap_servers}  # fmt: skip
    command = [sys.executable, "-m", "headwater", "run", "--until-now", "job_app:app"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    admin = KafkaAdmin(settings_for(embedded))
    wait_until(lambda: parked(admin, unique), "the event to be parked")
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "before it had handled all" in said


def parked(admin: KafkaAdmin, group: str) -> bool:
    return any(row.parked for row in partition_rows(admin, group))


def test_an_application_without_handlers_is_no_job(embedded: Engine, unique: str, tmp_path: Path) -> None:
    (tmp_path / "empty_app.py").write_text("from headwater import App\napp = App('empty')\n")
    environment = {**os.environ, "HEADWATER_BOOTSTRAP_SERVERS": embedded.bootstrap_servers}
    done = subprocess.run(
        [sys.executable, "-m", "headwater", "run", "--until-now", "empty_app:app"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no handlers" in done.stderr

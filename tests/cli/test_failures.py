"""What operators do about what failed: describe, dead-letters, replay, on both engines."""

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from confluent_kafka import Producer
from sqlalchemy import select
from typer.testing import CliRunner

from headwater import App, IdempotencyKey, Position, Retry, Tier, UnitOfWork
from headwater.event.codec import encode
from headwater.event.envelope import Cause
from headwater.kafka.admin import KafkaAdmin
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.commands import commands
from tests.kit.running import Running, settings_for
from tests.runtime.test_delivery import Paid, dead_letters, effects, metadata, publish_all, topic_for


def run(engine: Engine, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(commands, [*arguments, "--bootstrap-servers", engine.bootstrap_servers])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def run_json(engine: Engine, *arguments: str) -> Any:
    return json.loads(run(engine, *arguments, "--json"))


def parked(engine: Engine, group: str) -> list[dict[str, Any]]:
    """As the group's description has it; none while there is no group yet."""
    if group not in {each["group"] for each in run_json(engine, "groups", "list")}:
        return []
    return list(run_json(engine, "groups", "describe", group)["parked"])


class Bad:
    """An application whose handler fails for some numbers, until it is mended."""

    def __init__(self, engine: Engine, name: str, giving_up: str = "skip", retry: Retry | None = None) -> None:
        self.app = App(name, settings=settings_for(engine))
        self.bad: set[int] = set()
        self.seen: list[int] = []

        @self.app.handler(topic_for(name, 1), group=name, giving_up=giving_up, retry=retry or Retry(1))
        async def handle(event: Paid) -> None:
            if event.number in self.bad:
                raise RuntimeError(f"no account for {event.number}")
            self.seen.append(event.number)


def test_dead_letters_are_listed_filtered_shown_and_redriven(engine: Engine, unique: str) -> None:
    """S001.16: a redrive goes to its own group alone; dry run, filters by reason, key and offset; done is seen."""
    bad = Bad(engine, unique)
    bad.bad = {3, 4}
    publish_all(engine, topic_for(unique, 1), [Paid(f"a{i % 2}", i) for i in range(6)])
    with Running(bad.app):
        wait_until(lambda: len(bad.seen) == 4, "the good ones")
        wait_until(lambda: len(run_json(engine, "dead-letters", "list", unique)) == 2, "two dead letters")
        (one,) = run_json(engine, "dead-letters", "list", unique, "--key", "a1")
        assert (one["offset"], one["key"], one["attempts"], one["state"]) == (3, "a1", 1, "waiting")
        assert "no account for 3" in one["error"]
        assert run_json(engine, "dead-letters", "list", unique, "--reason", "elsewhere") == []
        assert "no account for 4" in run(engine, "dead-letters", "show", unique, "0", "4")
        run(engine, "dead-letters", "show", unique, "0", "5", code=1)

        assert "Dry run" in run(engine, "dead-letters", "redrive", unique, "--reason", "for 3")
        assert bad.seen.count(3) == 0
        bad.bad.clear()
        run(engine, "dead-letters", "redrive", unique, "--reason", "for 3", "--execute", "--wait", "20")
        wait_until(lambda: bad.seen.count(3) == 1, "the redriven one")
        run(engine, "dead-letters", "discard", unique, "--execute", "--wait", "20")
        wait_until(lambda: run_json(engine, "dead-letters", "list", unique) == [], "nothing to be left")

    states = {each["offset"]: each["state"] for each in run_json(engine, "dead-letters", "list", unique, "--all")}
    assert states == {3: "redrive", 4: "discard"}
    publish_all(engine, topic_for(unique, 1), [Paid("a1", 7)])
    later = Bad(engine, unique)
    with Running(later.app):
        wait_until(lambda: 7 in later.seen, "the next event after a restart")
        publish_all(engine, topic_for(unique, 1), [Paid("a1", 9)])
        wait_until(lambda: 9 in later.seen, "one more")
    assert later.seen == [7, 9], "what was redriven before the restart is not redriven again"
    assert bad.seen.count(4) == 0
    assert KafkaAdmin(settings_for(engine)).end_offsets([(unique, 0)]) == {(unique, 0): 8}


def test_a_call_is_known_by_the_same_key_at_every_attempt(engine: Engine, unique: str) -> None:
    """S003-10.6: tried again, parked, redriven after a restart, replayed: key and position stay; another group's key is another
    one. (both engines)"""
    topic = topic_for(unique, 1)
    seen: dict[str, list[tuple[int, str, Position]]] = {unique: [], f"{unique}-other": []}
    fails = threading.Event()
    fails.set()

    def make() -> App:
        app = App(unique, settings=settings_for(engine))
        for group, calls in seen.items():
            register(app, group, calls)
        return app

    def register(app: App, group: str, calls: list[tuple[int, str, Position]]) -> None:
        @app.handler(topic, group=group, retry=Retry(3, "100ms"))
        async def handle(event: Paid, key: IdempotencyKey, position: Position) -> None:
            calls.append((event.number, key, position))
            if fails.is_set():
                raise RuntimeError("not yet")

    publish_all(engine, topic, [Paid("a", 0), Paid("a", 1)])
    with Running(make()):
        wait_until(lambda: len(run_json(engine, "dead-letters", "list", unique)) == 2, "two dead letters")
    attempts = len(seen[unique])
    assert attempts >= 6
    fails.clear()
    with Running(make()):
        run(engine, "dead-letters", "redrive", unique, "--execute", "--wait", "20")
        wait_until(lambda: len(seen[unique]) == attempts + 2, "what was redriven")
    run(engine, "replay", unique, "--topic", unique, "--from", "earliest", "--execute")
    with Running(make()):
        wait_until(lambda: len(seen[unique]) == attempts + 4, "what is replayed")

    for calls in seen.values():
        assert {(number, position) for number, _, position in calls} == {(i, Position(unique, 0, i)) for i in (0, 1)}
        assert len({key for _, key, _ in calls}) == 2
    assert not {key for _, key, _ in seen[unique]} & {key for _, key, _ in seen[f"{unique}-other"]}


def test_a_held_key_goes_on_in_order_when_it_is_redriven_or_discarded(engine: Engine, unique: str) -> None:
    """S001.16: under hold a redrive restores the exact order, a discard goes past it; describe shows what is held."""
    bad = Bad(engine, unique, "hold")
    bad.bad = {2, 3}
    publish_all(engine, topic_for(unique, 1), [Paid(f"a{i % 2}", i) for i in range(8)])
    with Running(bad.app):
        wait_until(lambda: len(bad.seen) == 2, "what comes before")
        wait_until(
            lambda: (
                [
                    (each["key"], each["events"], each["held"])
                    for each in run_json(engine, "groups", "describe", unique)["parked"]
                ]
                == [("a0", 3, True), ("a1", 3, True)]
            ),
            "all that is behind them",
        )
        assert "held" in run(engine, "groups", "describe", unique)
        bad.bad.clear()
        run(engine, "dead-letters", "redrive", unique, "--key", "a0", "--execute")
        run(engine, "dead-letters", "discard", unique, "--key", "a1", "--execute")
        wait_until(lambda: len(bad.seen) == 7, "both keys")

    assert [n for n in bad.seen if n % 2 == 0] == [0, 2, 4, 6]
    assert [n for n in bad.seen if n % 2 == 1] == [1, 5, 7]


def test_describe_says_why_a_key_waits_and_when_it_is_tried_again(engine: Engine, unique: str) -> None:
    """S004.14: parked keys with their errors, attempts and next try."""
    bad = Bad(engine, unique, retry=Retry(50, "5s"))
    bad.bad = {0}
    publish_all(engine, topic_for(unique, 1), [Paid("a", i) for i in range(3)])
    with Running(bad.app):
        wait_until(lambda: any(each["events"] == 3 for each in parked(engine, unique)), "parking")
        (key,) = parked(engine, unique)

    assert key["key"] == "a"
    assert key["attempts"] >= 1
    assert key["due_at_ms"] > 0
    assert "no account for 0" in key["error"]


@pytest.mark.parametrize("outside", [False, True])
def test_a_replay_handles_exactly_its_range_again(
    engine: Engine, database_url: str, unique: str, outside: bool
) -> None:
    """S001.13: exactly those events, although the inbox knows them; outside effects stay silent unless asked; refused
    while the group is active; dry run."""
    topic = topic_for(unique, 2)
    mails: list[int] = []

    def make() -> App:
        app = App(unique, settings=settings_for(engine, database_url))

        @app.on_start
        async def create() -> None:
            metadata.create_all(app.database.engine)

        @app.handler(topic, group=unique, delivery="effectively_once")
        async def handle(event: Paid, uow: UnitOfWork) -> None:
            await uow.async_session.execute(effects.insert().values(account=event.account, number=event.number))

        @app.handler(topic, group=f"{unique}-mail", outside_effects=True)
        async def mail(event: Paid) -> None:
            mails.append(event.number)

        return app

    def numbers(app: App) -> list[int]:
        with app.database.engine.connect() as connection:
            return [number for (number,) in connection.execute(select(effects.c.number).order_by(effects.c.serial))]

    publish_all(engine, topic, [Paid(f"a{i % 7}", i) for i in range(40)])
    admin = KafkaAdmin(settings_for(engine))

    def is_through(count: int) -> bool:
        groups = (unique, f"{unique}-mail")
        return all(sum(p.offset for p in admin.committed(group).values()) == count for group in groups)

    app = make()
    with Running(app):
        wait_until(lambda: is_through(40), "the first time")
        run(engine, "replay", unique, "--topic", unique, "--from", "3", code=1)
    flag = ["--outside-effects"] if outside else []
    for group in (unique, f"{unique}-mail"):
        arguments = ["replay", group, "--topic", unique, "--from", "3", "--to", "6", *flag]
        dry = run_json(engine, *arguments)
        assert {row["events"] for row in dry} == {3}
        assert "lies before" in run(engine, "replay", group, "--topic", unique, "--from", "6", "--to", "3", code=1)
        run(engine, *arguments, "--execute")
        described = run_json(engine, "groups", "describe", group)
        assert {(row["replay"]["start"], row["replay"]["end"]) for row in described["partitions"]} == {(3, 6)}
    first_mails = len(mails)
    with Running(app := make()):
        wait_until(lambda: is_through(40), "the replay")
        found = numbers(app)
    app.database.engine.dispose()

    again = sorted(found)
    for number in range(40):
        again.remove(number)
    assert len(again) == 6
    assert len(mails) - first_mails == (6 if outside else 0)
    assert first_mails == 40


def test_a_dead_letter_topic_of_spring_can_be_read(engine: Engine, unique: str) -> None:
    """Dead letters that others wrote are listed with their reasons."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": engine.bootstrap_servers})
    producer.produce(
        f"{unique}-dlt", b"value", b"key",
        headers=[
            ("kafka_dlt-original-topic", unique.encode()),
            ("kafka_dlt-original-partition", (3).to_bytes(4, "big")),
            ("kafka_dlt-original-offset", (77).to_bytes(8, "big")),
            ("kafka_dlt-exception-fqcn", b"java.lang.IllegalStateException"),
            ("kafka_dlt-exception-message", b"no such order"),
        ],
    )  # fmt: skip
    producer.flush(10)
    (letter,) = run_json(engine, "dead-letters", "list", f"{unique}-dlt")

    assert (letter["topic"], letter["partition"], letter["offset"]) == (unique, 3, 77)
    assert letter["error"] == "java.lang.IllegalStateException: no such order"


def test_one_poison_in_ten_thousand_is_one_dead_letter_and_one_alert(embedded: Engine, unique: str) -> None:
    """S004.14: 9,999 are handled, one is a dead letter with its bytes untouched, and there is one alert."""
    from confluent_kafka import Producer

    topic = topic_for(unique, 3)
    app = App(unique, settings=settings_for(embedded))
    seen = 0

    @app.handler(topic, group=unique)
    async def handle(event: Paid) -> None:
        nonlocal seen
        seen += 1

    publish_all(embedded, topic, [Paid(f"a{i % 100}", i) for i in range(5000)])
    producer = Producer({"bootstrap.servers": embedded.bootstrap_servers})
    producer.produce(unique, b"\xff\x00 poison", b"a1", partition=0)
    producer.flush(10)
    publish_all(embedded, topic, [Paid(f"a{i % 100}", i) for i in range(5000, 9999)])
    raised: list[str] = []
    app._alerts._tell = lambda alert, *_: raised.append(alert)  # type: ignore[method-assign,assignment]
    with Running(app):
        wait_until(lambda: seen == 9999, "all the others", 60)
        (letter,) = dead_letters(embedded, unique, unique, 1)

    assert letter.source.value == b"\xff\x00 poison"
    assert raised == ["dead_letter"]


def test_what_happens_often_is_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """S004.14: the first at once, those of the next minute when it is over, with their count; a stop tells the rest."""
    from headwater.runtime import alert

    monkeypatch.setattr(alert, "TOGETHER_SECONDS", 0.2)
    told: list[Any] = []
    alerts = alert.Alerts("http://127.0.0.1:1/", "a")
    monkeypatch.setattr(alerts, "_send", lambda content: told.append((content["count"], content["detail"])))
    for number in range(4):
        alerts.happened("dead_letter", "g", "t", f"offset {number}")
    wait_until(lambda: len(told) == 2, "the rest of them")
    monkeypatch.setattr(alert, "TOGETHER_SECONDS", 60.0)
    wait_until(lambda: time.monotonic() > max(alerts._gather_ends.values()), "the end of the second minute")
    alerts.happened("dead_letter", "g", "t", "offset 4")
    alerts.happened("dead_letter", "g", "t", "offset 5")
    alerts.close()

    assert told == [(1, "offset 0"), (3, "3 more, the last: offset 3"), (1, "offset 4"), (1, "offset 5")]


def test_alerts_are_told_once_and_once_again_on_recovery(embedded: Engine, unique: str) -> None:
    """S004.11, S004.14: a webhook on a dead letter, on an outage and its end, on a tier's breach and its end."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    told: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from dataclasses import replace

    settings = replace(settings_for(embedded), alert_webhook=f"http://127.0.0.1:{server.server_port}/")
    app = App(unique, settings=settings)
    out, slow = threading.Event(), threading.Event()
    slow.set()

    class NoDatabase(Exception): ...

    @app.handler(topic_for(unique, 1), group=unique, tier="1s", unavailable=[NoDatabase], poison=[ZeroDivisionError])
    async def handle(event: Paid) -> None:
        if event.number == 1:
            raise ZeroDivisionError
        if event.number == 2:
            while slow.is_set():
                await asyncio.sleep(0.05)
        if event.number == 3 and out.is_set():
            raise NoDatabase("refused")

    def states(alert: str) -> list[str]:
        return [each["state"] for each in told if each["alert"] == alert]

    with Running(app):
        publish_all(embedded, topic_for(unique, 1), [Paid("a", 1)])
        wait_until(lambda: states("dead_letter") == ["raised"], "the dead letter's alert")
        publish_all(embedded, topic_for(unique, 1), [Paid("b", 2)])
        wait_until(lambda: states("tier")[-1:] == ["raised"], "the tier's alert")
        slow.clear()
        wait_until(lambda: states("tier")[-1:] == ["recovered"], "the tier's recovery")
        out.set()
        publish_all(embedded, topic_for(unique, 1), [Paid("c", 3)])
        wait_until(lambda: "raised" in states("breaker"), "the breaker's alert")
        out.clear()
        wait_until(lambda: states("breaker") == ["raised", "recovered"], "the breaker's recovery", 60)
        wait_until(lambda: states("tier")[-1:] == ["recovered"], "the tier's recovery")
    server.shutdown()

    tier = states("tier")  # a slow machine may be late with the first event too
    assert tier == ["raised", "recovered"] * (len(tier) // 2)
    assert states("dead_letter") == ["raised"]
    assert told[0]["group"] == unique


def test_a_tier_alarms_above_its_alarm_and_not_below(
    engine: Engine, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """S003-1.8: behind by 59 minutes: no alarm; by 61: one, and one more when it is over. (both engines)"""
    done = threading.Event()
    started: list[str] = []
    producer = Producer({"bootstrap.servers": engine.bootstrap_servers})

    def waiting(minutes: int) -> App:
        topic = topic_for(f"{unique}-{minutes}", 1)
        app = App(topic.name, settings=settings_for(engine))

        @app.handler(topic, group=topic.name, tier=Tier(target="24h", alarm="1h"))
        async def handle(event: Paid) -> None:
            started.append(topic.name)
            while not done.is_set():
                await asyncio.sleep(0.05)

        KafkaAdmin(app.settings).create_topic(topic.name, 1)
        written = encode(Paid("a", 1), unique, Cause("c", None))
        at = int(time.time() * 1000) - minutes * 60_000
        producer.produce(topic.name, written.value, b"a", timestamp=at)
        return app

    apps = [waiting(minutes) for minutes in (59, 61)]
    assert producer.flush(30) == 0

    def told(state: str) -> list[str]:
        words = f"alert alert=tier state={state} group="
        return [
            each.getMessage().partition(words)[2].split()[0] for each in caplog.records if words in each.getMessage()
        ]

    with Running(apps[0]), Running(apps[1]):
        wait_until(lambda: len(started) == 2 and told("raised") == [f"{unique}-61"], "the alarm")
        done.set()
        wait_until(lambda: told("recovered") == [f"{unique}-61"], "its end")
    assert told("raised") == [f"{unique}-61"]

"""Sagas: the decision by random schedules of answers, delays and losses; the whole on both engines and both databases."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert, select, text
from typer.testing import CliRunner

from headwater import App, Event, Saga, Step, Topic
from headwater.domain import saga_decision
from headwater.domain.saga import InvalidSaga
from headwater.domain.saga_decision import Decision, Definition, Record, Status
from headwater.store import tables
from headwater.store.database import Database
from headwater.store.tables import sagas
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.commands import commands
from tests.kit.running import Running, settings_for


class OrderPlaced(Event):
    order_id: str
    cents: int


class Reserve(Event):
    order_id: str


class Reserved(Event):
    order_id: str
    shelf: str


class Rejected(Event):
    order_id: str


class Release(Event):
    order_id: str
    shelf: str | None


class Released(Event):
    order_id: str


class Charge(Event):
    order_id: str
    cents: int


class Charged(Event):
    order_id: str


class Declined(Event):
    order_id: str


class Refund(Event):
    order_id: str


class Ship(Event):
    order_id: str


class Shipped(Event):
    order_id: str


class OrderConfirmed(Event):
    order_id: str


class OrderFailed(Event):
    order_id: str
    reason: str


class Fulfilment(msgspec.Struct, frozen=True):
    order_id: str
    cents: int
    shelf: str | None = None


def steps(deadline: str | None = "30s") -> list[Step]:
    return [
        Step("reserve", lambda s: Reserve(s.order_id), Reserved, Rejected,
             remember=lambda s, event: msgspec.structs.replace(s, shelf=event.shelf),
             compensation=lambda s: Release(s.order_id, s.shelf), compensated=Released, deadline=deadline),
        Step("charge", lambda s: Charge(s.order_id, s.cents), Charged, Declined,
             compensation=lambda s: Refund(s.order_id), deadline=deadline),
        Step("ship", lambda s: Ship(s.order_id), Shipped, deadline=deadline),
    ]  # fmt: skip


def definition(deadline: str | None = "30s") -> Definition:
    return Definition(
        steps(deadline), lambda s: OrderConfirmed(s.order_id), lambda s, why: OrderFailed(s.order_id, why)
    )


STATE = Fulfilment("o", 100)


def play(*events: object) -> list[object]:
    """What is published, when these are what happens; a number is a deadline of that turn."""
    saga = definition()
    decision = saga_decision.start(saga, STATE)
    published = list(decision.publish)
    for event in events:
        found = (
            saga_decision.deadline(saga, decision.record, decision.state, event)
            if isinstance(event, int)
            else saga_decision.answer(saga, decision.record, decision.state, event)
        )
        if found is not None:
            decision = found
            published += found.publish
    return [*published, decision.record.status]


RESERVED, SHIPPED = Reserved("o", "s1"), Shipped("o")
CANCELLED = "ship had no answer within 30s"


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([RESERVED, Charged("o"), SHIPPED],
         [Reserve("o"), Charge("o", 100), Ship("o"), OrderConfirmed("o"), Status.COMPLETED]),
        ([Rejected("o")], [Reserve("o"), OrderFailed("o", "reserve failed: Rejected"), Status.FAILED]),
        # in reverse, and what was remembered is known
        ([RESERVED, Declined("o"), Released("o")],
         [Reserve("o"), Charge("o", 100), Release("o", "s1"), OrderFailed("o", "charge failed: Declined"), Status.FAILED]),
        ([RESERVED, Charged("o"), 3, Released("o")],
         [Reserve("o"), Charge("o", 100), Ship("o"), Refund("o"), Release("o", "s1"), OrderFailed("o", CANCELLED),
          Status.FAILED]),
        # what comes twice changes nothing, nor does a deadline that isn't waited for any more
        ([RESERVED, RESERVED, 1, Charged("o"), Charged("o"), SHIPPED, SHIPPED, Declined("o")],
         [Reserve("o"), Charge("o", 100), Ship("o"), OrderConfirmed("o"), Status.COMPLETED]),
        # a step without an answer may have had its effect
        ([1, Released("o")],
         [Reserve("o"), Release("o", None), OrderFailed("o", "reserve had no answer within 30s"), Status.FAILED]),
        # its answer comes late: once more
        ([1, Released("o"), RESERVED, Released("o")],
         [Reserve("o"), Release("o", None), OrderFailed("o", "reserve had no answer within 30s"), Release("o", "s1"),
          Status.FAILED]),
        ([1, RESERVED, Released("o"), Released("o")],
         [Reserve("o"), Release("o", None), Release("o", "s1"), OrderFailed("o", "reserve had no answer within 30s"),
          Status.FAILED]),
        # a compensation that is never confirmed is sent five times
        ([RESERVED, Declined("o"), 3, 4, 5, 6, 7],
         [Reserve("o"), Charge("o", 100), *[Release("o", "s1")] * 5, Status.STUCK]),
        ([RESERVED, Declined("o"), 3, 4, 5, 6, 7, Released("o")],
         [Reserve("o"), Charge("o", 100), *[Release("o", "s1")] * 5, OrderFailed("o", "..."), Status.FAILED]),
    ],
)  # fmt: skip
def test_what_is_sent_for_what_happens(events: list[object], expected: list[object]) -> None:
    """S001.20: forward, back in reverse, twice, late, never."""
    found = play(*events)
    assert [type(each) for each in found] == [type(each) for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == other or (isinstance(other, OrderFailed) and other.reason == "...")


class World:
    """Services that do each command when it reaches them, and answer in any order, late. Half of them get a compensation
    before what it undoes now and then, and always answer; half get them in order, and never answer now and then."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.reorders = seed % 2 == 0
        self.saga = definition()
        self.done: dict[str, int] = defaultdict(int)
        self.queues: dict[str, list[object]] = {"Reserve": [], "Charge": [], "Ship": []}
        self.answers: list[object] = []
        self.told: list[object] = []
        self.decision = saga_decision.start(self.saga, STATE)
        self._take(self.decision)

    def _take(self, decision: Decision) -> None:
        self.decision = decision
        for each in decision.publish:
            if isinstance(each, OrderConfirmed | OrderFailed):
                self.told.append(each)
            else:
                service = {"Release": "Reserve", "Refund": "Charge"}.get(type(each).__name__, type(each).__name__)
                self.queues[service].append(each)

    def _serve(self, name: str) -> None:
        queue = self.queues[name]
        command = queue.pop(self.chance.randrange(len(queue)) if self.reorders and self.chance.random() < 0.3 else 0)
        fails = self.chance.random() < 0.25
        if isinstance(command, Reserve):
            self.done["stock"] = 0 if fails else 1
            self._say(Rejected("o") if fails else RESERVED)
        elif isinstance(command, Release):
            self.done["stock"] = 0
            self._say(Released("o"))
        elif isinstance(command, Charge):
            self.done["money"] = 0 if fails else 1
            self._say(Declined("o") if fails else Charged("o"))
        elif isinstance(command, Refund):
            self.done["money"] = 0
        elif isinstance(command, Ship):
            self._say(SHIPPED)

    def _say(self, event: object) -> None:
        if self.reorders or self.chance.random() < 0.9:  # some never answer, having done what was asked
            self.answers.append(event)

    def step(self) -> bool:
        """Whether anything is left to happen."""
        record = self.decision.record
        choices: list[str] = [name for name, queue in self.queues.items() if queue]
        if self.answers:
            choices += ["answer", "answer"]
        if self.decision.wait is not None and (not choices or self.chance.random() < 0.1):
            choices = ["deadline"]
        if record.status is Status.STUCK and not choices:
            choices = ["resume"]
        if not choices:
            return False
        choice = self.chance.choice(choices)
        found: Decision | None = None
        if choice == "answer":
            i = self.chance.randrange(len(self.answers))
            event = self.answers[i] if self.chance.random() < 0.1 else self.answers.pop(i)  # some come twice
            found = saga_decision.answer(self.saga, record, self.decision.state, event)
        elif choice == "deadline":
            found = saga_decision.deadline(self.saga, record, self.decision.state, record.turn)
        elif choice == "resume":
            found = saga_decision.resume(self.saga, record, self.decision.state, is_compensated=False)
        else:
            self._serve(choice)
        if found is not None:
            self._take(found)
        return True


@pytest.mark.parametrize("first", range(0, 20_000, 2_000))
def test_in_the_end_all_is_done_or_nothing_is_left(first: int) -> None:
    """S001.20: twenty thousand schedules: completed with stock and money, or failed with neither; told once."""
    ends: dict[Status, int] = defaultdict(int)
    for seed in range(first, first + 2_000):
        world = World(seed)
        for _ in range(2_000):
            if not world.step():
                break
        else:
            pytest.fail(f"seed {seed}: it does not end")
        status = world.decision.record.status
        ends[status] += 1
        assert len(world.told) == 1, f"seed {seed}: told {world.told}"
        left = (world.done["stock"], world.done["money"])
        if status is Status.COMPLETED:
            assert left == (1, 1), f"seed {seed}: completed with {left}"
        else:
            assert status is Status.FAILED, f"seed {seed}: it ends {status}"
            assert left == (0, 0), f"seed {seed}: failed with {left} left"
    assert min(ends[Status.COMPLETED], ends[Status.FAILED]) > 100


def test_a_saga_goes_on_under_another_order_of_steps() -> None:
    """A release puts a step in front: what is under way is where it was. One that is gone is said."""
    saga = definition()
    record = saga_decision.answer(saga, saga_decision.start(saga, STATE).record, STATE, RESERVED)
    assert record is not None
    assert record.record.step == 1
    newer = saga._replace(steps=[Step("check", lambda s: Ship(s.order_id), OrderPlaced), *saga.steps])
    found = saga_decision.aligned(newer, record.record)
    assert found is not None
    assert newer.steps[found.step].name == "charge"
    assert saga_decision.aligned(saga._replace(steps=[saga.steps[0]]), record.record) is None


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED])
def test_one_that_has_ended_needs_no_step(status: Status) -> None:
    """The step that it ended at is gone: what comes late or twice is judged by those that are there."""
    saga = definition()
    record = Record(status, len(saga.steps) - 1, 7, names=tuple(step.name for step in saga.steps))
    shorter = saga._replace(steps=saga.steps[:1])
    found = saga_decision.aligned(shorter, record)
    assert found is not None
    late = saga_decision.answer(shorter, found, STATE, RESERVED)
    assert (late is not None) == (status is Status.FAILED)  # what a failed one has had done is undone


def test_a_record_is_the_same_when_it_is_read_back() -> None:
    record = Record(Status.STUCK, 1, 7, (0, 2), 5, ("a", "b", "c"), True, "why")
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record


# As an application


def make_saga(name: str, deadline: str | None = "30s") -> Saga:
    return Saga(
        name, state=Fulfilment, key="order_id", starts=OrderPlaced,
        begin=lambda event: Fulfilment(event.order_id, event.cents), steps=steps(deadline),
        completed=lambda s: OrderConfirmed(s.order_id), failed=lambda s, why: OrderFailed(s.order_id, why),
    )  # fmt: skip


def topics_for(name: str) -> tuple[Topic, Topic, Topic]:
    orders = Topic(f"{name}.orders", key="order_id", events=[OrderPlaced, OrderConfirmed, OrderFailed], partitions=3)
    asked = Topic(f"{name}.asked", key="order_id", events=[Reserve, Release, Charge, Refund, Ship], partitions=3)
    answers = Topic(f"{name}.answers", key="order_id", events=[Reserved, Rejected, Released, Charged, Declined, Shipped],
                    partitions=3)  # fmt: skip
    return orders, asked, answers


class Services:
    """What the commands do, by order: declines and silence by the order's name."""

    def __init__(self, app: App, asked: Topic, group: str) -> None:
        self.stock: dict[str, int] = defaultdict(int)
        self.money: dict[str, int] = defaultdict(int)

        @app.handler(asked, group=group)
        async def serve(
            event: Reserve | Release | Charge | Refund | Ship,
        ) -> Reserved | Rejected | Released | Charged | Declined | Shipped | None:
            id = event.order_id
            if isinstance(event, Reserve):
                self.stock[id] = 1
                return Reserved(id, f"shelf of {id}")
            if isinstance(event, Release):
                assert event.shelf in (None, f"shelf of {id}")
                self.stock[id] = 0
                return None if "stuck" in id else Released(id)
            if isinstance(event, Charge):
                if "declined" in id:
                    return Declined(id)
                self.money[id] = event.cents
                return Charged(id)
            if isinstance(event, Refund):
                self.money[id] = 0
                return None
            return None if "silent" in id else Shipped(id)


def test_orders_are_fulfilled_or_undone(engine: Engine, database_url: str, unique: str) -> None:
    """S001.20, S001.9: accepted, declined and never answered, at once; what is done is undone. (both engines, both
    databases)"""
    orders, asked, answers = topics_for(unique)
    app = App(unique, topics=[orders, asked, answers], settings=settings_for(engine, database_url))
    make_saga(unique, "4s").join(app, [orders, answers])
    services = Services(app, asked, f"{unique}-services")
    ends: dict[str, list[object]] = defaultdict(list)

    @app.handler(orders, group=f"{unique}-ends")
    async def note(event: OrderConfirmed | OrderFailed) -> None:
        ends[event.order_id].append(event)

    ids = [f"{kind}-{i}" for i in range(5) for kind in ("fine", "declined", "silent")]
    with Running(app):
        wait_until(lambda: app._relay is not None, "the application")
        with app.unit_of_work(app.database.sessions()) as uow:
            for id in ids:
                uow.publish(OrderPlaced(id, 100))
        wait_until(lambda: len(ends) == len(ids), "all of them to end", 60)
        wait_until(
            lambda: not any(services.money[id] for id in ids if "fine" not in id), "the refunds"
        )  # sent before the end
    for id in ids:
        fine = "fine" in id
        assert [type(end) for end in ends[id]] == [OrderConfirmed if fine else OrderFailed]
        assert (services.stock[id], services.money[id]) == ((1, 100) if fine else (0, 0))


SERVICE = """
    import sys
    from headwater import App, Settings
    from tests.domain.test_saga import make_saga, topics_for

    servers, url, name = sys.argv[1:4]
    orders, asked, answers = topics_for(name)
    app = App(name, topics=[orders, asked, answers], settings=Settings(servers, url, kafka={"session.timeout.ms": "6000"}))
    make_saga(name, "5s").join(app, [orders, answers])
"""


def test_kill_9_leaves_no_order_half_done(embedded: Engine, database_url: str, unique: str, tmp_path: Path) -> None:
    """S001.9, S001.20: the saga's process is killed again and again while orders go through it: each ends once, done or
    undone. (both databases)"""
    (tmp_path / "saga_service.py").write_text(textwrap.dedent(SERVICE.replace("sys.argv[1:4]", "sys.argv[-3:]")))
    script = tmp_path / "run.py"
    script.write_text("import saga_service\nfrom headwater.runtime.lifecycle import run\nrun(saga_service.app)\n")
    orders, asked, answers = topics_for(unique)
    app = App(
        f"{unique}-w", topics=[orders, asked, answers], settings=settings_for(embedded, f"sqlite:///{tmp_path}/w.db")
    )
    services = Services(app, asked, f"{unique}-services")
    ends: dict[str, set[str]] = defaultdict(set)

    @app.handler(orders, group=f"{unique}-ends")
    async def note(event: OrderConfirmed | OrderFailed) -> None:
        ends[event.order_id].add(type(event).__name__)

    ids = [f"{'declined' if i % 3 == 0 else 'fine'}-{i}" for i in range(45)]
    command = [sys.executable, str(script), embedded.bootstrap_servers, database_url, unique]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent.parent}",
                   "HEADWATER_KAFKA_GROUP_INSTANCE_ID": "saga"}  # fmt: skip
    with Running(app):
        wait_until(lambda: app._relay is not None, "the application")
        process = subprocess.Popen(command, env=environment)
        try:
            for round_ in range(3):
                with app.unit_of_work(app.database.sessions()) as uow:
                    for id in ids[round_ * 15 : round_ * 15 + 15]:
                        uow.publish(OrderPlaced(id, 100))
                before = len(ends)
                wait_until(lambda before=before: len(ends) > before, "an order to end", 60)  # type: ignore[misc]
                process.kill()
                process.wait()
                process = subprocess.Popen(command, env=environment)
            wait_until(lambda: len(ends) == len(ids), "all of them to end", 60)
            undone = [id for id in ids if "OrderFailed" in ends[id]]
            wait_until(  # an answer that comes late is compensated late
                lambda: not any(services.stock[id] or services.money[id] for id in undone),
                "what is left to be undone",
                60,
            )
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    confirmed = {id for id, end in ends.items() if end == {"OrderConfirmed"}}  # some pass their deadline in a restart
    assert all(len(end) == 1 for end in ends.values())
    assert confirmed
    assert not [id for id in confirmed if "declined" in id]
    assert {id for id in ids if (services.stock[id], services.money[id]) == (1, 100)} == confirmed
    assert all((services.stock[id], services.money[id]) == (0, 0) for id in ids if id not in confirmed)


def test_a_stuck_saga_is_seen_and_resumed(
    embedded: Engine, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`headwater sagas list|show|resume`: who is stuck, where and why; taken as compensated, it ends."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    monkeypatch.setattr(saga_decision, "COMPENSATION_ATTEMPTS", 2)
    orders, asked, answers = topics_for(unique)

    def make() -> App:
        app = App(unique, topics=[orders, asked, answers], settings=settings_for(embedded, url))
        make_saga("fulfilment", "2s").join(app, [orders, answers])
        Services(app, asked, f"{unique}-services")
        return app

    app = make()
    ends: list[object] = []

    @app.handler(orders, group=f"{unique}-ends")
    async def note(event: OrderConfirmed | OrderFailed) -> None:
        ends.append(event)

    module = tmp_path / "stuck_app.py"
    module.write_text("from tests.domain import test_saga\napp = test_saga.MADE()\n")
    monkeypatch.setitem(globals(), "MADE", make)
    monkeypatch.chdir(tmp_path)
    with Running(app):
        wait_until(lambda: app._relay is not None, "the application")
        with app.unit_of_work(app.database.sessions()) as uow:
            uow.publish(OrderPlaced("first", 100))
        wait_until(lambda: len(ends) == 1, "all groups to have joined", 60)
        ends.clear()
        with app.unit_of_work(app.database.sessions()) as uow:
            uow.publish(OrderPlaced("declined-stuck", 100))

        def rows(*arguments: str) -> Any:
            result = CliRunner().invoke(commands, ["sagas", *arguments, "--json"])
            assert result.exit_code == 0, result.output
            return json.loads(result.output)

        listed = ("list", "stuck_app:app", "--status", "stuck")
        wait_until(lambda: len(rows(*listed)) == 1, "it to be stuck", 60)
        (row,) = rows(*listed)
        assert (row["saga"], row["id"], row["status"], row["step"]) == (
            "fulfilment",
            "declined-stuck",
            "stuck",
            "reserve",
        )
        assert "2 times without an answer" in row["reason"]
        assert rows("show", "stuck_app:app", "fulfilment", "declined-stuck")["state"]["cents"] == 100
        assert rows("resume", "stuck_app:app", "fulfilment", "declined-stuck", "--as-compensated") == {"resumed": True}
        wait_until(lambda: len(ends) == 1, "the end")
        failed = CliRunner().invoke(commands, ["sagas", "resume", "stuck_app:app", "fulfilment", "declined-stuck"])
        assert failed.exit_code == 1
        assert "is failed, not stuck" in failed.output


def test_what_has_ended_is_kept_for_a_while(database_url: str, unique: str) -> None:
    """Completed and failed ones go when they are old; what is under way or stuck stays, however old. (both databases)"""
    saga = make_saga(unique)
    database = Database(database_url)
    tables.create_tables(database.engine)
    long_ago, lately = datetime.now(UTC) - timedelta(days=31), datetime.now(UTC) - timedelta(days=29)
    record = msgspec.json.encode(saga_decision.start(definition(), STATE).record).decode()
    with database.sessions() as session, session.begin():
        for status in Status:
            for age, at in (("old", long_ago), ("young", lately)):
                session.execute(insert(sagas).values(
                    saga=unique, id=f"{status.value}-{age}", status=status.value, record=record, state="{}", version=1,
                    updated_at=at,
                ))  # fmt: skip
        assert saga.clean(session) == 2
        left = {id for (id,) in session.execute(select(sagas.c.id).where(sagas.c.saga == unique))}
    assert {f"{status.value}-{age}" for status in Status for age in ("old", "young")} - left == {
        "completed-old", "failed-old",
    }  # fmt: skip
    database.engine.dispose()


def test_a_saga_that_can_not_work_is_refused(unique: str) -> None:
    """With what to change."""
    orders, _, answers = topics_for(unique)
    with pytest.raises(InvalidSaga, match="no steps"):
        Saga("x", state=Fulfilment, key="order_id", starts=OrderPlaced, begin=lambda e: STATE, steps=[])
    with pytest.raises(InvalidSaga, match=r"goes by 'cents', which Reserved doesn't have"):
        Saga("x", state=Fulfilment, key="cents", starts=OrderPlaced, begin=lambda e: STATE, steps=steps())
    with pytest.raises(InvalidSaga, match="Charged twice"):
        Saga(
            "x",
            state=Fulfilment,
            key="order_id",
            starts=OrderPlaced,
            begin=lambda e: STATE,
            steps=[*steps(), steps()[1]],
        )
    twice = [steps()[0], Step("reserve", lambda s: Ship(s.order_id), Shipped)]
    with pytest.raises(InvalidSaga, match="two steps of one name"):
        Saga("x", state=Fulfilment, key="order_id", starts=OrderPlaced, begin=lambda e: STATE, steps=twice)
    app = App(unique)
    words = [
        Topic(f"{unique}.{i}.answers", key="order_id", events=each.events) for i, each in enumerate((orders, answers))
    ]
    make_saga("w").join(app, words)  # two topics that end in one word
    assert len({handler.group for handler in app.handlers}) == 3
    with pytest.raises(InvalidSaga, match="topics that list Reserved"):
        make_saga("x").join(App(unique), [orders])


def test_other_writers_of_a_saga_are_noticed(tmp_path: Path, unique: str) -> None:
    """Two answers at once: one is tried again, none is lost."""
    orders, asked, answers = topics_for(unique)
    app = App(
        unique,
        topics=[orders, asked, answers],
        settings=settings_for(Engine("none", "127.0.0.1:1"), f"sqlite:///{tmp_path}/x.db"),
    )
    saga = make_saga("x")
    saga.join(app, [orders, answers])
    make_saga("y").join(app, [orders, answers])  # two of them in one application
    tables.create_tables(app.database.engine)
    from headwater.domain.saga import StaleSaga

    async def main() -> None:
        async def handle(event: object) -> None:
            async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
                await saga.handle(event, uow)

        await handle(OrderPlaced("o", 1))
        async with app.database.async_sessions() as session:
            row = await session.run_sync(saga.load, "o")
        await handle(RESERVED)
        assert row is not None
        stale = saga._decide(row, RESERVED)
        assert stale is not None
        async with app.database.async_sessions() as session:
            with pytest.raises(StaleSaga):
                await session.run_sync(lambda sync: saga._save(sync, id="o", row=row, decision=stale))
            with pytest.raises(StaleSaga):
                await session.run_sync(lambda sync: saga._save(sync, id="o", row=None, decision=stale))
        await app.database.close()

    asyncio.run(main())
    with app.database.engine.connect() as connection:
        assert connection.execute(text("SELECT version FROM headwater_sagas")).scalar_one() == 2

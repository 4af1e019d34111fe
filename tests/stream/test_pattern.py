"""Patterns: by the events' own time, in any order, through restarts. On both engines and both databases."""

import asyncio
import random
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater import App, Event, Topic
from headwater.stream.pattern import InvalidPattern, Known, absent, repeated
from tests.conftest import Engine
from tests.kit.clients import wait_until
from tests.kit.running import Running, settings_for


class PaymentFailed(Event):
    user_id: str
    number: int


class SuspiciousPayments(Event):
    user_id: str
    count: int


class CartChanged(Event):
    cart_id: str


class OrderCreated(Event):
    cart_id: str


class CartAbandoned(Event):
    cart_id: str


START = datetime(2026, 1, 1, tzinfo=UTC)


def minutes(*numbers: float) -> list[datetime]:
    return [START + timedelta(minutes=number) for number in numbers]


def failures(name: str = "failures", within: str = "10m") -> Any:
    return repeated(name, of=PaymentFailed, by="user_id", count=3, within=within,
                    signal=lambda user, times: SuspiciousPayments(user, len(times)))  # fmt: skip


def abandoned(name: str = "abandoned", within: str = "30m") -> Any:
    return absent(name, after=CartChanged, without=OrderCreated, by="cart_id", within=within,
                  signal=lambda cart: CartAbandoned(cart))  # fmt: skip


@pytest.mark.parametrize(
    ("times", "signals"),
    [
        ((0, 5, 10), 1),
        ((0, 5, 10.1), 0),
        ((0, 5, 10.1, 11), 1),
        ((0, 1, 2, 3, 4), 1),  # those that were signalled count no more
        ((0, 1, 2, 3, 4, 5), 2),
        ((10, 0, 5), 1),  # out of order
        ((0, 1, 2, 1.5, 1.2, 1.7), 1),  # late, within what was signalled
        ((0, 30, 60, 90), 0),
        ((0, 30, 35, 39), 1),
        ((100, 101, 102, 90, 91, 92), 2),  # a burst that comes behind a later one
        ((90, 91, 105, 106, 107, 92), 2),
        ((100, 101, 102, 79, 78, 77), 1),  # later than twice the time
    ],
)
def test_so_many_within_a_time(times: tuple[float, ...], signals: int) -> None:
    """S001.22: 3 within 10 minutes of their own time raise one signal."""
    known, found = Known(), 0
    for at in minutes(*times):
        outcome = failures()._decide(PaymentFailed("u", 1), "u", at, known)
        known, found = outcome.known, found + (outcome.publish is not None)
    assert found == signals


def test_the_order_of_arrival_counts_for_nothing() -> None:
    """Any shuffle within twice the time gives as many signals for one burst; what is kept is bounded."""
    for seed in range(300):
        chance = random.Random(seed)
        times = minutes(*(chance.uniform(0, 9) for _ in range(3)), *(20 * i + 40 for i in range(5)))
        known, found = Known(), 0
        burst, rest = times[:3], times[3:]
        chance.shuffle(burst)
        for at in [*burst, *rest]:
            outcome = failures()._decide(PaymentFailed("u", 1), "u", at, known)
            known, found = outcome.known, found + (outcome.publish is not None)
            assert len(known.times) <= 6
        assert found == 1, f"seed {seed}"


@pytest.mark.parametrize(
    ("events", "waits_until"),
    [
        ([(CartChanged, 0)], 30),
        ([(CartChanged, 0), (CartChanged, 10)], 40),
        ([(CartChanged, 10), (CartChanged, 0)], 40),  # the older one comes later
        ([(CartChanged, 0), (OrderCreated, 5)], None),
        ([(OrderCreated, 5), (CartChanged, 0)], None),  # the other topic was faster
        ([(OrderCreated, 5), (CartChanged, 10)], 40),  # a new cart after the order
        ([(CartChanged, 10), (OrderCreated, 5)], 40),  # an order of before
        ([(CartChanged, 0), (OrderCreated, 31)], 30),  # too late, by its own time
        ([(OrderCreated, 31), (CartChanged, 0)], 30),
        ([(CartChanged, 0), (OrderCreated, 5), (CartChanged, 3)], None),
        ([(CartChanged, 0), (OrderCreated, 5), (CartChanged, 6)], 36),
    ],
)
def test_one_without_another(events: list[tuple[Any, float]], waits_until: float | None) -> None:
    """S001.10, S001.22: by their own times, in whatever order they come."""
    assert alone(events) == ([waits_until] if waits_until is not None else [])


def alone(events: list[tuple[Any, float]]) -> list[float]:
    """When carts are abandoned, in minutes, if time stands still while the events come."""
    known = Known()
    waiting: set[datetime] = set()
    for cls, minute in events:
        outcome = abandoned()._decide(cls("c"), "c", minutes(minute)[0], known)
        known = outcome.known
        waiting.difference_update(outcome.cancels)
        if outcome.wait is not None:
            waiting.add(outcome.wait[1])
        assert len(known.times) <= 6
        assert len(known.others) <= 6
    return sorted((since - START) / timedelta(minutes=1) + 30 for since in waiting)


moments = st.lists(st.tuples(st.sampled_from([CartChanged, OrderCreated]), st.integers(0, 59)), max_size=8, unique=True)


@given(moments, st.randoms(use_true_random=False))
def test_whatever_the_order_the_same_carts_are_abandoned(
    events: list[tuple[Any, float]], chance: random.Random
) -> None:
    """Within twice the time: those that no order and no other change follows within half an hour."""
    changes = [at for cls, at in events if cls is CartChanged]
    orders = [at for cls, at in events if cls is OrderCreated]
    expected = [
        at + 30.0 for at in sorted(changes)
        if not any(at < each <= at + 30 for each in changes) and not any(at <= each <= at + 30 for each in orders)
    ]  # fmt: skip
    chance.shuffle(events)
    assert alone(events) == expected


def test_patterns_are_found_over_restarts(engine: Engine, database_url: str, unique: str) -> None:
    """S001.10, S001.22: the third failure comes after a restart, an idle cart is abandoned once, one that orders is not.
    (both engines, both databases)"""
    payments = Topic(f"{unique}.payments", key="user_id", events=[PaymentFailed, SuspiciousPayments], partitions=3)
    carts = Topic(f"{unique}.carts", key="cart_id", events=[CartChanged, CartAbandoned], partitions=3)
    orders = Topic(f"{unique}.orders", key="cart_id", events=[OrderCreated], partitions=3)
    seen: dict[str, list[object]] = defaultdict(list)

    def make() -> App:
        app = App(unique, topics=[payments, carts, orders], settings=settings_for(engine, database_url))
        failures(f"{unique}-f").join(app, [payments])
        abandoned(f"{unique}-a", "4s").join(app, [carts, orders])

        @app.handler(payments, group=f"{unique}-s")
        async def suspicious(event: SuspiciousPayments) -> None:
            seen[event.user_id].append(event)

        @app.handler(carts, group=f"{unique}-c")
        async def cart(event: CartAbandoned) -> None:
            seen[event.cart_id].append(event)

        return app

    def publish(app: App, *events: object) -> None:
        async def main() -> None:
            async with app.lifespan():
                for event in events:
                    await app.publish(event)

        asyncio.run(main())

    publisher = App(f"{unique}-p", topics=[payments, carts, orders], settings=settings_for(engine))
    with Running(make()):
        publish(publisher, *(PaymentFailed("u1", i) for i in range(2)), CartChanged("idle"), CartChanged("ordered"))
        publish(publisher, OrderCreated("ordered"), PaymentFailed("u2", 1))
        wait_until(lambda: len(seen["idle"]) == 1, "the idle cart")
    with Running(make()):
        publish(publisher, PaymentFailed("u1", 3), CartChanged("last"))
        wait_until(lambda: len(seen["u1"]) == 1 and len(seen["last"]) == 1, "the signals")
    assert {key: len(found) for key, found in seen.items() if found} == {"idle": 1, "u1": 1, "last": 1}


def test_a_pattern_that_can_not_be_looked_for_is_refused(unique: str, tmp_path: Path) -> None:
    payments = Topic(unique, key="user_id", events=[PaymentFailed])
    with pytest.raises(InvalidPattern, match="at least 2"):
        repeated("x", of=PaymentFailed, by="user_id", count=1, within="1m", signal=lambda key, times: key)
    with pytest.raises(InvalidPattern, match=r"goes by 'cart', which PaymentFailed doesn't have"):
        repeated("x", of=PaymentFailed, by="cart", count=2, within="1m", signal=lambda key, times: key)
    with pytest.raises(InvalidPattern, match="without itself"):
        absent("x", after=CartChanged, without=CartChanged, by="cart_id", within="1m", signal=lambda key: key)
    with pytest.raises(InvalidPattern, match="topics that list CartChanged, OrderCreated"):
        abandoned().join(App(unique), [payments])

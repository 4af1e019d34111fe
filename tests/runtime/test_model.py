"""The failure contract under random schedules: no counterexample, and with a rule taken out there are some."""

import gc
import logging
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest

from headwater.runtime.lane import Verdict
from headwater.runtime.owner import Owner
from headwater.runtime.retry import GivingUp
from tests.runtime.model import Options, Violation, run_schedules

KINDS = ("async", "sync", "batch")
OPTIONS = [
    Options(giving_up, has_inbox, has_breaker, kind)
    for kind in KINDS
    for giving_up in GivingUp
    for has_inbox in (False, True)
    for has_breaker in (True, False)
]
OPTIONS += [
    Options(has_breaker=has_breaker, kind=kind, settles_first=True) for kind in KINDS for has_breaker in (True, False)
]
OPTIONS += [Options(has_inbox=has_inbox, kind=kind, has_retry=False) for kind in KINDS for has_inbox in (True, False)]
FIRST_SEED = int(os.environ.get("HEADWATER_TEST_SEED", "0"))
CHUNK = 400


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_schedule_breaks_a_promise(options: Options) -> None:
    """S001.16, S002.7, S004.14: C1 to C6 and C8, over crashes, zombies, lost acknowledgements, outages and redrives."""
    run_schedules(FIRST_SEED, 100, options)


def _quietly() -> None:
    """In a process of its own: no logs, and garbage is collected between chunks only, for a sixth of the time."""
    logging.disable()
    gc.disable()


def _run_chunk(first: int, options: Options) -> int:
    count = run_schedules(first, CHUNK, options)
    gc.collect()
    return count


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_thousand_schedules() -> None:
    """S001.16: the same, at length."""
    each = 5_600
    with ProcessPoolExecutor(max_workers=2, initializer=_quietly) as pool:
        jobs = [
            pool.submit(_run_chunk, first, options)
            for options in OPTIONS
            for first in range(FIRST_SEED + 1000, FIRST_SEED + 1000 + each, CHUNK)
        ]
        assert sum(job.result() for job in jobs) == each * len(OPTIONS) >= 200_000


def without_rules_1_and_2(owner: Owner) -> None:
    owner.work.lanes._is_settled = lambda offset, parked: False  # type: ignore[method-assign]


def without_rule_2(owner: Owner) -> None:
    owner.work.lanes._is_settled = lambda offset, parked: offset in parked  # type: ignore[method-assign]


def without_rule_3(owner: Owner) -> None:
    owner.work.lanes._is_below_floor = lambda offset, key: False  # type: ignore[method-assign]


def without_rule_4(owner: Owner) -> None:
    """Events of a parked key are handled at once."""
    arrive = owner.work.lanes.arrive

    def overtake(offset: int, key: object, event: object) -> object:
        verdict, lane = arrive(offset, key, event)  # type: ignore[arg-type]
        if verdict is Verdict.PARK and lane is not None and lane.queue:
            lane.queue.pop()
            lane.is_at_work = True
            return Verdict.RUN, lane
        return verdict, lane

    owner.work.lanes.arrive = overtake  # type: ignore[method-assign,assignment]


def with_others_facts(owner: Owner) -> None:
    """What zombies write is taken in while running."""
    read = owner.read_retry_topic

    def take_in(records: object) -> None:
        was, owner.work.is_loaded = owner.work.is_loaded, False
        try:
            read(records)  # type: ignore[arg-type]
        finally:
            owner.work.is_loaded = was

    owner.read_retry_topic = take_in  # type: ignore[method-assign,assignment]


def with_commits_of_what_is_at_work(owner: Owner) -> None:
    owner.work.frontier.take = lambda offsets: owner.work.frontier.advance(max(offsets) + 1)  # type: ignore[method-assign]


def without_hold(owner: Owner) -> None:
    owner.work.policy = owner.work.policy._replace(giving_up=GivingUp.SKIP)


def without_waiting_for_the_key(owner: Owner) -> None:
    """Events of one key go at once."""
    arrive = owner.work.lanes.arrive

    def at_once(offset: int, key: object, event: object) -> object:
        verdict, lane = arrive(offset, offset, event)  # type: ignore[arg-type]
        return verdict, lane

    owner.work.lanes.arrive = at_once  # type: ignore[method-assign,assignment]


def with_settling_before_the_ack(owner: Owner) -> None:
    """What is about to be parked counts as settled."""
    begin = owner._parking.begin

    def too_early(lane: object, event: object = None, attempted: object = None) -> None:
        if event is not None:
            owner.work.frontier.settle(event.offset())  # type: ignore[attr-defined]
        begin(lane, event, attempted)  # type: ignore[arg-type]

    owner._parking.begin = too_early  # type: ignore[method-assign,assignment]


WITHOUT: list[tuple[Callable[[Owner], None], Options]] = [
    (without_rules_1_and_2, Options()),
    (without_rule_2, Options()),
    (without_rule_3, Options()),
    (without_rule_4, Options()),
    (with_others_facts, Options()),
    (with_commits_of_what_is_at_work, Options()),
    (without_hold, Options(GivingUp.HOLD)),
    (without_waiting_for_the_key, Options()),
    (with_settling_before_the_ack, Options()),
]


@pytest.mark.parametrize(("rule", "options"), WITHOUT, ids=lambda each: getattr(each, "__name__", ""))
def test_with_a_rule_taken_out_a_counterexample_is_found(rule: Callable[[Owner], None], options: Options) -> None:
    """The search can fail: each rule is needed."""
    with pytest.raises(Violation, match="seed"):
        run_schedules(0, 5000, options, rule)

"""Verdicts are Burrow's, on the cases that it is tested with."""

import pytest
from hypothesis import given, strategies

from headwater.operations.verdict import Commit, Verdict, judge, of_group

RISING = [1000, 2000, 3000, 4000, 5000]
SAME = [1000] * 5
BACK = [1000, 2000, 3000, 2000, 4000]
FROM_0, FROM_50, FROM_100 = [0, 50, 100, 150, 200], [50, 100, 150, 200, 250], [100, 150, 200, 250, 300]
BACK_LAGS = [100, 150, 200, 1250, 300]
ONE_BY_ONE = [Commit(792748079 + i, 1512224618356 + 1003 * i, 0) for i in range(15)]


def each_100_s(offsets: list[int], lags: list[int]) -> list[Commit]:
    return [Commit(offset, 100_000 * (i + 1), lag) for i, (offset, lag) in enumerate(zip(offsets, lags, strict=True))]


GAPS = [Commit(1000 + 500 * i, 100_000 + 50_000 * i, None if i % 2 else 25 * i) for i in range(10)]
CASES = {
    "no lag somewhere": (each_100_s(RISING, FROM_0), [5200], 200, 600, 0, Verdict.OK),
    "silent for as long as the window": (each_100_s(RISING, FROM_0), [5200], 200, 900, 0, Verdict.OK),
    "silent for longer": (each_100_s(RISING, FROM_0), [5200], 200, 1000, 0, Verdict.STOP),
    "silent, and behind all the time": (each_100_s(RISING, FROM_50), [5250], 250, 1000, 0, Verdict.STOP),
    "the same offset, but no lag at first": (each_100_s(SAME, FROM_0), [1200], 200, 600, 0, Verdict.OK),
    "the same offset": (each_100_s(SAME, FROM_100), [1300], 300, 600, 0, Verdict.STALL),
    "the same offset, the same lag": (each_100_s(SAME, [100] * 5), [1100], 100, 600, 0, Verdict.STALL),
    "went back, and is further now": (each_100_s(BACK, BACK_LAGS), [4300], 300, 600, 0, Verdict.OK),
    "silent, but there is no lag": (each_100_s(RISING, FROM_50), [5250], 0, 1000, 0, Verdict.OK),
    "silent with new records": (
        ONE_BY_ONE, [792749024, 792749000, 792748800, 792748600, 792748500], 931, 1512224650, 0, Verdict.STOP
    ),
    "silent, and had no lag just now": (
        ONE_BY_ONE, [792748094, 792748093, 792748093, 792748093], 1, 1512224650, 0, Verdict.OK
    ),
    "some lags are not known": (GAPS, [5700], 200, 600, 0, Verdict.OK),
    "silent, within the allowed lag": (
        [Commit(1000, 100_000, 2), Commit(2000, 200_000, 1), Commit(2000, 300_000, 1)], [2001], 1, 550, 1, Verdict.OK
    ),
    "the same offset, above the allowed lag": (each_100_s(SAME, FROM_100), [1300], 300, 600, 99, Verdict.STALL),
    "went back, above the allowed lag": (each_100_s(BACK, BACK_LAGS), [4300], 300, 600, 99, Verdict.OK),
    "went back, and is not there yet": (
        each_100_s([1000, 2000, 3000, 2000, 2500], BACK_LAGS), [4300], 300, 600, 0, Verdict.REWIND
    ),
    "advances, and falls behind": (each_100_s(RISING, FROM_50), [5250], 250, 600, 0, Verdict.WARN),
    "advances, and catches up": (each_100_s(RISING, FROM_50[::-1]), [5050], 50, 600, 0, Verdict.OK),
    "nothing was ever committed": ([], [100], 100, 600, 0, Verdict.OK),
}  # fmt: skip


@pytest.mark.parametrize(("commits", "ends", "lag", "now", "allowed", "verdict"), CASES.values(), ids=CASES)
def test_verdicts_are_burrows(
    commits: list[Commit], ends: list[int], lag: int, now: int, allowed: int, verdict: Verdict
) -> None:
    """S004.12: the cases of Burrow's own test of its rules, and those that it lacks."""
    assert judge(commits, ends, lag, now * 1000, allowed) is verdict


@given(strategies.lists(strategies.sampled_from(Verdict), max_size=6))
def test_a_group_is_as_its_worst_partition(verdicts: list[Verdict]) -> None:
    """S004.12: 1 OK, 2 WARN; whatever is worse is ERR."""
    worst = max((each.code for each in verdicts), default=1)
    assert of_group(verdicts).code == min(worst, 3)


def test_the_codes_are_burrows() -> None:
    assert {each.value: each.code for each in Verdict} == {
        "OK": 1, "WARN": 2, "ERR": 3, "STOP": 4, "STALL": 5, "REWIND": 6,
    }  # fmt: skip

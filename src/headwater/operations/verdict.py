"""Whether a group keeps up with a partition, by what it committed over a window: Burrow's rules and names.

The rules are those of Burrow's caching evaluator (core/internal/evaluator/caching.go), so that alarms that were tuned for it
mean the same. Lag alone says little: a group that is behind and catches up is well, one that is ten records behind and has not
committed for an hour isn't.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple


class Verdict(StrEnum):
    OK = "OK"
    WARN = "WARN"
    """It advances, and its lag never fell."""
    ERR = "ERR"
    """Of a group: one of its partitions is worse than WARN."""
    STOP = "STOP"
    """Nobody commits any more."""
    STALL = "STALL"
    """It commits the same offset again and again."""
    REWIND = "REWIND"
    """It went back, and is not yet where it was."""

    @property
    def code(self) -> int:
        """The number that Burrow's gauges have for it."""
        return list(Verdict).index(self) + 1


class Commit(NamedTuple):
    offset: int
    at_ms: int
    lag: int | None
    """In records, when it was seen; None: it is not known."""


def judge(commits: Sequence[Commit], ends: Iterable[int], lag: int, now_ms: int, allowed_lag: int = 0) -> Verdict:
    """Of one partition. commits: oldest first. ends: where the partition ended at looks of late. lag: now."""
    if lag <= allowed_lag or not commits:
        return Verdict.OK
    if _is_stopped(commits, now_ms) and not any(end <= commits[-1].offset for end in ends):
        return Verdict.STOP
    if _is_rewound(commits):
        return Verdict.REWIND
    if any(each.lag is not None and each.lag <= allowed_lag for each in commits):
        return Verdict.OK
    if all(each.offset == commits[0].offset for each in commits):
        return Verdict.STALL
    lags = [each.lag for each in commits if each.lag is not None]
    return Verdict.OK if any(later < earlier for earlier, later in pairwise(lags)) else Verdict.WARN


def of_group(verdicts: Iterable[Verdict]) -> Verdict:
    worst = max(verdicts, key=lambda each: each.code, default=Verdict.OK)
    return min(worst, Verdict.ERR, key=lambda each: each.code)


def _is_stopped(commits: Sequence[Commit], now_ms: int) -> bool:
    """The last commit is longer ago than the window of commits is long."""
    return now_ms - commits[-1].at_ms > commits[-1].at_ms - commits[0].at_ms


def _is_rewound(commits: Sequence[Commit]) -> bool:
    for place, (earlier, later) in enumerate(pairwise(commits)):
        if later.offset < earlier.offset:
            return all(each.offset < earlier.offset for each in commits[place + 1 :])
    return False

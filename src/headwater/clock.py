"""The only door to time.

Everything that asks what time it is gets a `Clock`; the tests put one in its place that stands still until it is moved
(`headwater.testing.clock`).
"""

import time
from typing import Protocol


class Clock(Protocol):
    def now_ms(self) -> int:
        """Milliseconds since 1970: what records and retention go by."""

    def monotonic(self) -> float:
        """Seconds that never go back: what time-outs go by."""


class SystemClock:
    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

"""What is done about a handler that fails: classes of failure, and how often and when it is tried again.

    @app.handler(orders, group="inventory", retry=Retry(5, "1s..1m"), poison=[ValidationError], giving_up="hold")

poison        never works: undecodable, or of a type that the handler names. Not tried again.
conflict      another writer was faster: tried again in place, at once.
unavailable   nothing would work now: the database, the broker or the registry can't be reached, or a type that the handler names.
              Everything of the handler waits until it works again; it counts as no attempt.
transient     all others.
"""

import random
from collections.abc import Sequence
from enum import StrEnum

from headwater.declaration import WrongDeclaration
from headwater.event.codec import Undecodable
from headwater.kafka.producer import NotPublished
from headwater.kafka.registry_client import RegistryUnreachable
from headwater.settings import duration_seconds
from headwater.store.database import is_unavailable

IN_PLACE_SECONDS = 2.0
"""For all tries in place together, which count as one attempt: a key that waits for longer is parked."""
IN_PLACE_PAUSES = (0.05, 0.25, 0.75)
CONFLICT_PAUSES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
MAX_ERROR = 1000


class Kind(StrEnum):
    """The class of a failure."""

    POISON = "poison"
    CONFLICT = "conflict"
    UNAVAILABLE = "unavailable"
    TRANSIENT = "transient"


class Delivery(StrEnum):
    """What a handler promises about an event that was acknowledged: see docs/concepts/delivery.md."""

    AT_MOST_ONCE = "at_most_once"
    AT_LEAST_ONCE = "at_least_once"
    EFFECTIVELY_ONCE = "effectively_once"
    EXACTLY_ONCE = "exactly_once"


class GivingUp(StrEnum):
    """What happens to a key when an event of it was given up on."""

    SKIP = "skip"
    """The next event of the key goes on."""
    HOLD = "hold"
    """The key waits until somebody redrives or discards the dead letter."""


class InvalidRetry(WrongDeclaration, ValueError):
    """A retry policy that makes no sense; the message says why."""


class Retry:
    """So many attempts in all, with pauses that double between two bounds: `Retry(10, "1s..10m")`."""

    def __init__(self, attempts: int = 10, pauses: str = "1s..10m") -> None:
        """Raises InvalidRetry, InvalidSetting."""
        least, separator, most = pauses.partition("..")
        self.attempts = attempts
        self.least_seconds = duration_seconds(least)
        self.most_seconds = duration_seconds(most) if separator else self.least_seconds
        if attempts < 1 or self.most_seconds < self.least_seconds:
            raise InvalidRetry(
                f'Retry({attempts}, "{pauses}") makes no sense: at least one attempt, and pauses as in "1s..10m".'
            )

    def pause_seconds(self, attempts: int, chance: random.Random) -> float:
        """After so many attempts. Up to half of it is left to chance, so that keys that failed together part."""
        longest = min(self.least_seconds * 2.0 ** min(attempts - 1, 60), self.most_seconds)
        return longest * chance.uniform(0.5, 1.0)

    def __repr__(self) -> str:
        return f'Retry({self.attempts}, "{self.least_seconds:g}s..{self.most_seconds:g}s")'


Errors = Sequence[type[BaseException]]


class FailureKinds:
    """The handler's own error types, before ours."""

    def __init__(self, poison: Errors = (), conflict: Errors = (), unavailable: Errors = ()) -> None:
        self._poison = (*poison, Undecodable)
        self._conflict = tuple(conflict)
        self._unavailable = tuple(unavailable)

    def of(self, error: BaseException) -> Kind:
        if isinstance(error, self._poison):
            return Kind.POISON
        if isinstance(error, self._conflict):
            return Kind.CONFLICT
        if isinstance(error, (*self._unavailable, RegistryUnreachable)) or is_unavailable(error):
            return Kind.UNAVAILABLE
        if isinstance(error, NotPublished) and not error.is_about_the_record:
            return Kind.UNAVAILABLE
        return Kind.TRANSIENT


def said_by(error: BaseException) -> str:
    """The error's own words, in a form that can be committed, logged and shown whatever they are."""
    try:
        words = str(error)
    except Exception:
        words = "(it can't be put in words)"
    text = f"{type(error).__name__}: {words}"[:MAX_ERROR]
    return text.encode("utf-8", "replace").decode().replace("\0", " ")

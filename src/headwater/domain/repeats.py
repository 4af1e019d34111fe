"""Events that their producer published twice, as an outbox does whose relay dies between the broker's answer and the delete.

Which records are repeats is said by the log alone: those whose event is among the records shortly before, in their partition. So
whoever reads it, from wherever, finds the same ones: the live side of a projection and a rebuild.
"""

import hashlib
import itertools
from collections.abc import Mapping

from headwater.event.envelope import Envelope
from headwater.kafka.reader import Place

WINDOW = 10_000
"""Offsets within which an event is known again. A relay has at most 4,000 rows of a shard under way, which are sent again when it
dies; what others write meanwhile comes in between."""


class Repeats:
    """The events of the last `WINDOW` offsets of each partition."""

    def __init__(self) -> None:
        self._latest: dict[Place, dict[bytes, int]] = {}
        """Where an event stood last, the oldest first."""
        self._answers: dict[Place, dict[int, bool]] = {}
        """Of what was asked for and not passed yet: a batch that fails is asked for again."""

    def has(self, place: Place, offset: int, envelope: Envelope) -> bool:
        """Whether the event stands within the window before this offset. Records of a partition come in order."""
        answers = self._answers.setdefault(place, {})
        if offset not in answers:
            # an id is its source's, and somebody else's may be the same
            name = f"{envelope.source}\0{envelope.event_type}\0{envelope.event_id}"
            event = hashlib.blake2b(name.encode(), digest_size=16).digest()
            latest = self._latest.setdefault(place, {})
            answers[offset] = latest.pop(event, -1) >= max(0, offset - WINDOW)
            latest[event] = offset
        return answers[offset]

    def passed(self, positions: Mapping[Place, int]) -> None:
        """Nothing before these is asked for any more."""
        for place, position in positions.items():
            answers, latest = self._answers.get(place, {}), self._latest.get(place, {})
            for offset in [offset for offset in answers if offset < position]:
                del answers[offset]
            old = list(itertools.takewhile(lambda event: latest[event] < position - WINDOW, latest))  # noqa: B023
            for event in old:
                del latest[event]

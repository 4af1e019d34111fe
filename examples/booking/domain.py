"""What the booking system speaks of. Everything about a practitioner is in order: it is the key of all three topics.

The topics of events are kept for seven days, which is not enough to build the read models of bookings made earlier: the newest
state of each slot and practitioner is kept for ever, in compacted topics.
"""

from datetime import date

import msgspec

from headwater import Event, Topic


class Schedule(msgspec.Struct, frozen=True):
    """The hours of a practitioner's day, as numbered slots."""

    day: date
    slots: int


class PractitionerChanged(Event):
    practitioner_id: str
    name: str
    specialty: str
    days: list[Schedule]


class BookingCreated(Event):
    practitioner_id: str
    booking_id: str
    email: str
    phone: str
    day: date
    slot: int


class BookingCancelled(Event):
    practitioner_id: str
    booking_id: str
    email: str
    phone: str
    day: date
    slot: int


class AvailabilityChanged(Event):
    """Whether a slot is free, as far as the availability service knew just then."""

    practitioner_id: str
    booking_id: str
    day: date
    slot: int
    is_free: bool


class SlotTaken(Event):
    """Who has a slot; a tombstone when nobody has it any more. By the slot, not the booking: who had it before and who has it
    next must be in order."""

    slot_id: str
    practitioner_id: str
    day: date
    slot: int
    booking_id: str


class PractitionerState(Event):
    practitioner_id: str
    name: str
    specialty: str
    days: list[Schedule]


bookings = Topic(
    "booking-events", key="practitioner_id", partitions=6, retention="7d", replication=3,
    events=[BookingCreated, BookingCancelled], configs={"min.insync.replicas": "2"},
)  # fmt: skip
availability = Topic(
    "availability-events", key="practitioner_id", partitions=6, retention="7d", replication=3,
    events=[AvailabilityChanged], configs={"min.insync.replicas": "2"},
)  # fmt: skip
practitioners = Topic(
    "practitioner-events", key="practitioner_id", partitions=6, retention="7d", replication=3,
    events=[PractitionerChanged], configs={"min.insync.replicas": "2"},
)  # fmt: skip
slot_states = Topic(
    "slot-states", key="slot_id", partitions=6, compacted=True, replication=3, events=[SlotTaken],
    configs={"min.insync.replicas": "2"},
)  # fmt: skip
practitioner_states = Topic(
    "practitioner-states", key="practitioner_id", partitions=6, compacted=True, replication=3,
    events=[PractitionerState], configs={"min.insync.replicas": "2"},
)  # fmt: skip


def slot_id(practitioner_id: str, day: date, slot: int) -> str:
    return f"{practitioner_id}:{day.isoformat()}:{slot}"


def slot_of(id: str) -> tuple[str, date, int]:
    """Whose, when, which."""
    practitioner_id, day, slot = id.rsplit(":", 2)
    return practitioner_id, date.fromisoformat(day), int(slot)

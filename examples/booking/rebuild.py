"""Both read models from the states, for when they are lost, or older than the events: `headwater run --until-now
examples.booking.rebuild:app`, beside the services that go on.

States are kept for ever, one for each slot that is taken and each practitioner, so this reads as much as there is to show.
What is booked or cancelled meanwhile comes through the services as ever: the state of a slot is said in order, and a document's
version says which is newer. A rebuild is begun anew by deleting its groups.
"""

from examples.booking.bitmap import Bitmap
from examples.booking.domain import PractitionerState, SlotTaken, practitioner_states, slot_of, slot_states
from examples.booking.index import REBUILT, Index
from headwater import App, Envelope, Tombstone

GROUPS = ("rebuild-availability", "rebuild-search", "rebuild-practitioners")

app = App("rebuild")
bitmap = Bitmap()
index = Index()


@app.handler(slot_states, group="rebuild-availability")
async def fill_bitmap(event: SlotTaken | Tombstone) -> None:
    if isinstance(event, Tombstone):
        await bitmap.free(*slot_of(event.key.decode()))
    else:
        await bitmap.book(event.booking_id, event.practitioner_id, event.day, event.slot)


@app.handler(practitioner_states, group="rebuild-practitioners")
def fill_practitioners(event: PractitionerState) -> None:
    index.put_practitioner(event.practitioner_id, event.name, event.specialty, event.days)


@app.handler(slot_states, group="rebuild-search")
def fill_slots(event: SlotTaken | Tombstone, envelope: Envelope) -> None:
    is_free = isinstance(event, Tombstone)
    place = (
        slot_of(event.key.decode()) if isinstance(event, Tombstone) else (event.practitioner_id, event.day, event.slot)
    )
    index.put_slot(*place, is_free, REBUILT, envelope.event_id)

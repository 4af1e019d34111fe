"""The availability service: the bitmap follows created and cancelled bookings, and what changed is told. Group `availability`."""

from examples.booking.bitmap import Bitmap
from examples.booking.domain import AvailabilityChanged, BookingCancelled, BookingCreated, availability, bookings
from headwater import App

app = App("availability-service", topics=[availability])
bitmap = Bitmap()


@app.handler(bookings, group="availability")
async def follow_bookings(event: BookingCreated | BookingCancelled) -> AvailabilityChanged:
    """A booking that comes twice changes nothing, and what is told is what is so now."""
    change = bitmap.book if isinstance(event, BookingCreated) else bitmap.cancel
    is_taken = await change(event.booking_id, event.practitioner_id, event.day, event.slot)
    return AvailabilityChanged(event.practitioner_id, event.booking_id, event.day, event.slot, not is_taken)

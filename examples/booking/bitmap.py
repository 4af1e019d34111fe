"""Who is taken when, in Redis: a bitmap for each practitioner and day, a bit for each slot.

A booking's id is what makes its changes happen once: `booking:ID` says whether it stands, `holder:SLOT` who has the slot. One
script looks and changes, so two processes can't come between each other.
"""

import os
from datetime import date
from typing import Any

from redis.asyncio import Redis

from examples.booking.domain import slot_id

# KEYS: bitmap, holder, booking. ARGV: what, the slot's number, the booking's id. Answers 1 when the slot is taken now.
CHANGE = """
local what, slot, id = ARGV[1], ARGV[2], ARGV[3]
if what == 'free' then
  redis.call('SETBIT', KEYS[1], slot, 0)
  redis.call('DEL', KEYS[2])
elseif what == 'book' and redis.call('GET', KEYS[3]) ~= 'cancelled' then
  redis.call('SETBIT', KEYS[1], slot, 1)
  redis.call('SET', KEYS[2], id)
  redis.call('SET', KEYS[3], 'booked')
elseif what == 'cancel' then
  local holder = redis.call('GET', KEYS[2])
  if not holder or holder == id then
    redis.call('SETBIT', KEYS[1], slot, 0)
    redis.call('DEL', KEYS[2])
  end
  redis.call('SET', KEYS[3], 'cancelled')
end
return redis.call('GETBIT', KEYS[1], slot)
"""


class Bitmap:
    def __init__(self) -> None:
        self._redis: Any = Redis.from_url(os.environ.get("BOOKING_REDIS_URL", "redis://127.0.0.1:6379"))
        self._change = self._redis.register_script(CHANGE)

    async def book(self, booking_id: str, practitioner_id: str, day: date, slot: int) -> bool:
        """Whether the slot is taken afterwards."""
        return await self._do("book", booking_id, practitioner_id, day, slot)

    async def cancel(self, booking_id: str, practitioner_id: str, day: date, slot: int) -> bool:
        """Whether the slot is taken afterwards: by another booking."""
        return await self._do("cancel", booking_id, practitioner_id, day, slot)

    async def free(self, practitioner_id: str, day: date, slot: int) -> None:
        """Whoever had it."""
        await self._do("free", "", practitioner_id, day, slot)

    async def _do(self, what: str, booking_id: str, practitioner_id: str, day: date, slot: int) -> bool:
        keys = [
            f"taken:{practitioner_id}:{day}",
            f"holder:{slot_id(practitioner_id, day, slot)}",
            f"booking:{booking_id}",
        ]
        return int(await self._change(keys=keys, args=[what, slot, booking_id])) == 1

"""`python -m examples.booking.feed`: people who book, and some who cancel, of a hundred practitioners and thirty days."""

import argparse
import asyncio
import random
import uuid
from datetime import date, timedelta

import httpx

SPECIALTIES = ("cardiology", "dermatology", "neurology", "paediatrics")
FIRST_DAY = date(2026, 2, 1)
DAYS = 30
SLOTS = 16
PRACTITIONERS = 100
CANCELLED = 0.3
PER_SECOND = 20.0


def schedule(days: int = DAYS, slots: int = SLOTS) -> list[dict[str, object]]:
    return [{"day": (FIRST_DAY + timedelta(days=i)).isoformat(), "slots": slots} for i in range(days)]


def practitioner(number: int, days: int = DAYS, slots: int = SLOTS) -> dict[str, object]:
    specialty = SPECIALTIES[number % len(SPECIALTIES)]
    return {"name": f"Dr. {number}", "specialty": specialty, "days": schedule(days, slots)}


def booking(chance: random.Random, practitioners: int = PRACTITIONERS) -> dict[str, object]:
    patient = chance.randrange(100_000)
    return {
        "practitionerId": f"p-{chance.randrange(practitioners)}",
        "email": f"patient-{patient}@example.com",
        "phone": f"+1-555-{patient:05d}",
        "day": (FIRST_DAY + timedelta(days=chance.randrange(DAYS))).isoformat(),
        "slot": chance.randrange(SLOTS),
    }


async def feed(url: str, per_second: float) -> None:
    """Until it is ended."""
    chance = random.Random()
    placed: list[str] = []
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for number in range(PRACTITIONERS):
            await client.put(f"/practitioners/p-{number}", json=practitioner(number))
        while True:
            await asyncio.sleep(1 / per_second)
            try:
                if placed and chance.random() < CANCELLED:
                    await client.delete(f"/bookings/{placed.pop(chance.randrange(len(placed)))}")
                    continue
                id = uuid.uuid4().hex
                answer = await client.put(f"/bookings/{id}", json=booking(chance))
                if answer.status_code == 201:
                    placed.append(id)
            except httpx.TransportError:
                await asyncio.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Book and cancel appointments.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--per-second", type=float, default=PER_SECOND)
    options = parser.parse_args()
    asyncio.run(feed(options.url, options.per_second))


if __name__ == "__main__":
    main()

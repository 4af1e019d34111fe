"""The search service: follows availability, not bookings, and practitioners. Group `search`, `search-practitioners`."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.booking.domain import AvailabilityChanged, PractitionerChanged, availability, practitioners
from examples.booking.index import FIRST_EVENT, Index
from examples.web import serve
from headwater import App, Envelope, Position

app = App("search-service")
index = Index()


@app.handler(practitioners, group="search-practitioners")
def follow_practitioner(event: PractitionerChanged) -> None:
    index.put_practitioner(event.practitioner_id, event.name, event.specialty, event.days)


@app.handler(availability, group="search")
def follow_availability(event: AvailabilityChanged, envelope: Envelope, position: Position) -> None:
    version = FIRST_EVENT + position.offset
    index.put_slot(event.practitioner_id, event.day, event.slot, event.is_free, version, envelope.event_id)


async def find(request: Request) -> Response:
    specialty, day = request.query_params.get("specialty"), request.query_params.get("day")
    if not specialty or not day:
        return JSONResponse({"error": "say which specialty and which day: /slots?specialty=...&day=2026-02-01"}, 422)
    found = await asyncio.get_running_loop().run_in_executor(None, index.find, specialty, day)
    return JSONResponse(found)


web = serve(app, "SEARCH_PORT", 8001, [Route("/slots", find)])

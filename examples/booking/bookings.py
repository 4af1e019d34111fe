"""The booking service: practitioners with their days, and who takes which slot. A booking and the events about it are one
transaction; nobody else is asked while it is made."""

from datetime import date

import msgspec
from sqlalchemy import Column, Index, Integer, MetaData, String, Table, Text, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.booking.domain import (
    BookingCancelled,
    BookingCreated,
    PractitionerChanged,
    PractitionerState,
    Schedule,
    SlotTaken,
    bookings,
    practitioner_states,
    practitioners,
    slot_id,
    slot_states,
)
from examples.web import body_of, refused, serve
from headwater import App, Tombstone

app = App("booking-service", topics=[bookings, practitioners, slot_states, practitioner_states])
metadata = MetaData()
practitioner_table = Table(
    "practitioners",
    metadata,
    Column("practitioner_id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("specialty", String(200), nullable=False),
    Column("days", Text, nullable=False),
)
booking_table = Table(
    "bookings",
    metadata,
    Column("booking_id", String(64), primary_key=True),
    Column("practitioner_id", String(64), nullable=False),
    Column("email", String(200), nullable=False),
    Column("phone", String(40), nullable=False),
    Column("day", String(10), nullable=False),
    Column("slot", Integer, nullable=False),
    Column("status", String(10), nullable=False),
    Index(
        "one_booking_a_slot", "practitioner_id", "day", "slot", unique=True,
        sqlite_where=text("status = 'booked'"), postgresql_where=text("status = 'booked'"),
    ),
)  # fmt: skip


class Practitioner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    specialty: str
    days: list[Schedule]


class Booking(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    practitioner_id: str
    email: str
    phone: str
    day: date
    slot: int


@app.on_start
async def create_tables() -> None:
    async with app.database.async_engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


async def put_practitioner(request: Request) -> Response:
    id = request.path_params["practitioner_id"]
    try:
        given: Practitioner = await body_of(request, Practitioner)
    except msgspec.MsgspecError as error:
        return refused(error)
    values = {"name": given.name, "specialty": given.specialty, "days": msgspec.json.encode(given.days).decode()}
    async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
        changed = update(practitioner_table).where(practitioner_table.c.practitioner_id == id).values(**values)
        known = (await session.execute(changed.returning(practitioner_table.c.practitioner_id))).first()
        if known is None:
            await session.execute(insert(practitioner_table).values(practitioner_id=id, **values))
        uow.publish(PractitionerChanged(id, given.name, given.specialty, given.days))
        uow.publish(PractitionerState(id, given.name, given.specialty, given.days))
    return JSONResponse({"practitionerId": id}, 200 if known else 201)


async def put_booking(request: Request) -> Response:
    """The same booking again is the same booking."""
    id = request.path_params["booking_id"]
    try:
        given: Booking = await body_of(request, Booking)
    except msgspec.MsgspecError as error:
        return refused(error)
    async with app.database.async_sessions() as session:
        known = (await session.execute(select(booking_table).where(booking_table.c.booking_id == id))).first()
        if known is not None:
            return JSONResponse({"bookingId": id, "status": known.status}, 200)
        query = select(practitioner_table.c.days).where(practitioner_table.c.practitioner_id == given.practitioner_id)
        days = await session.scalar(query)
        schedules = msgspec.json.decode(days, type=list[Schedule]) if days is not None else []
        if not any(each.day == given.day and 0 <= given.slot < each.slots for each in schedules):
            return JSONResponse({"error": "the practitioner has no such slot"}, 404)
        await session.rollback()
        try:
            async with app.unit_of_work(session) as uow:
                values = {**msgspec.structs.asdict(given), "day": given.day.isoformat(), "status": "booked"}
                await session.execute(insert(booking_table).values(booking_id=id, **values))
                uow.publish(BookingCreated(given.practitioner_id, id, given.email, given.phone, given.day, given.slot))
                at = slot_id(given.practitioner_id, given.day, given.slot)
                uow.publish(SlotTaken(at, given.practitioner_id, given.day, given.slot, id))
        except IntegrityError:
            known = (await session.execute(select(booking_table).where(booking_table.c.booking_id == id))).first()
            if known is not None:  # the same booking, sent twice at once
                return JSONResponse({"bookingId": id, "status": known.status}, 200)
            return JSONResponse({"error": "the slot is taken"}, 409)
    return JSONResponse({"bookingId": id, "status": "booked"}, 201)


async def delete_booking(request: Request) -> Response:
    id = request.path_params["booking_id"]
    async with app.database.async_sessions() as session, app.unit_of_work(session) as uow:
        ended = update(booking_table).where(booking_table.c.booking_id == id, booking_table.c.status == "booked")
        row = (await session.execute(ended.values(status="cancelled").returning(booking_table))).first()
        if row is None:
            return JSONResponse({"error": "there is no such booking"}, 404)
        day = date.fromisoformat(row.day)
        uow.publish(BookingCancelled(row.practitioner_id, id, row.email, row.phone, day, row.slot))
        uow.publish(Tombstone(slot_states, slot_id(row.practitioner_id, day, row.slot)))
    return Response(status_code=204)


async def get_booking(request: Request) -> Response:
    async with app.database.async_sessions() as session:
        query = select(booking_table).where(booking_table.c.booking_id == request.path_params["booking_id"])
        row = (await session.execute(query)).first()
    if row is None:
        return JSONResponse({"error": "there is no such booking"}, 404)
    return JSONResponse(
        {"bookingId": row.booking_id, "practitionerId": row.practitioner_id, "day": row.day, "slot": row.slot,
         "status": row.status}
    )  # fmt: skip


web = serve(
    app,
    "BOOKING_PORT",
    8000,
    [
        Route("/practitioners/{practitioner_id}", put_practitioner, methods=["PUT"]),
        Route("/bookings/{booking_id}", get_booking),
        Route("/bookings/{booking_id}", put_booking, methods=["PUT"]),
        Route("/bookings/{booking_id}", delete_booking, methods=["DELETE"]),
    ],
)

"""Analytics, added later: every booking counted, from the first on. Group `analytics`."""

from sqlalchemy import Column, Integer, MetaData, String, Table

from examples.booking.domain import BookingCancelled, BookingCreated, bookings
from examples.upsert import add_to
from headwater import App, UnitOfWork

app = App("analytics-service")
metadata = MetaData()
counts = Table(
    "counts", metadata, Column("kind", String(40), primary_key=True), Column("events", Integer, nullable=False)
)


@app.on_start
async def create_tables() -> None:
    metadata.create_all(app.database.engine)


@app.handler(bookings, group="analytics", delivery="effectively_once")
def count(event: BookingCreated | BookingCancelled, uow: UnitOfWork) -> None:
    session = uow.sync_session
    dialect = session.get_bind().dialect.name
    session.execute(add_to(counts, dialect, {"kind": type(event).__name__}, {"events": 1}))

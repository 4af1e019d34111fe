"""The tables that Headwater keeps in an application's database.

headwater_outbox       events that are to be published: see headwater.store.outbox
headwater_inbox        events that were handled, by group: see headwater.store.inbox
headwater_patterns     what patterns know of their keys: see headwater.stream.pattern
headwater_projections  how far read models are: see headwater.store.read_model
headwater_sagas        long processes: see headwater.domain.saga
headwater_timers       events that are to be published later: see headwater.store.schedule
"""

from sqlalchemy import (
    DDL,
    BigInteger,
    Column,
    DateTime,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    event,
    func,
    text,
)

metadata = MetaData()

CREATION_LOCK = 0x68656165

outbox = Table(
    "headwater_outbox",
    metadata,
    Column("position", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("event_id", String(64), nullable=False, unique=True),
    Column("topic", String(249), nullable=False),
    Column("key", LargeBinary, nullable=True),
    Column("event_type", String(249), nullable=False),
    Column("payload", LargeBinary, nullable=True),
    Column("headers", LargeBinary, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    sqlite_autoincrement=True,  # a position that was deleted is not given out again
)

inbox = Table(
    "headwater_inbox",
    metadata,
    Column("consumer_group", String(249), primary_key=True),
    Column("event_id", String(400), primary_key=True),
    Column("generation", BigInteger, primary_key=True, server_default=text("0")),
    Column("state", String(8), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Index("headwater_inbox_age", "consumer_group", "created_at"),
)

timers = Table(
    "headwater_timers",
    metadata,
    Column("application", String(200), primary_key=True),
    Column("name", String(400), primary_key=True),
    Column("due_ms", BigInteger, nullable=False),
    Column("event_id", String(64), nullable=False),
    Column("topic", String(249), nullable=False),
    Column("key", LargeBinary, nullable=True),
    Column("event_type", String(249), nullable=False),
    Column("payload", LargeBinary, nullable=True),
    Column("headers", LargeBinary, nullable=False),
    Index("headwater_timers_due", "application", "due_ms"),
)

sagas = Table(
    "headwater_sagas",
    metadata,
    Column("saga", String(200), primary_key=True),
    Column("id", String(400), primary_key=True),
    Column("status", String(16), nullable=False),
    Column("record", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now(), onupdate=func.now()),
    Index("headwater_sagas_status", "saga", "status", "updated_at"),
)

patterns = Table(
    "headwater_patterns",
    metadata,
    Column("pattern", String(200), primary_key=True),
    Column("key", String(400), primary_key=True),
    Column("known", Text, nullable=False),
    Column("newest_ms", BigInteger, nullable=False),
    Index("headwater_patterns_age", "pattern", "newest_ms"),
)

projections = Table(
    "headwater_projections",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("side", String(8), primary_key=True),
    Column("progress", Text, nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

# Positions are given out before the commit, so a later one can become visible first. The transaction's id tells the
# relay which rows are below every transaction that is still open.
event.listen(
    outbox,
    "after_create",
    DDL("ALTER TABLE headwater_outbox ADD COLUMN xact_id xid8 NOT NULL DEFAULT pg_current_xact_id()").execute_if(
        dialect="postgresql"
    ),
)


def create_tables(engine: Engine) -> None:
    """Those that are missing; several processes may start at once."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": CREATION_LOCK})
        metadata.create_all(connection)

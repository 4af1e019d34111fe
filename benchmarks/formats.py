"""Events with schemas: data into an Event and back, beside the bare library.

The bare library gives what it gives: fastavro a dict, protobuf a message, msgspec a Struct. Ours gives the Event, checked.
"""

import functools
import io
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

import fastavro
import msgspec
from google.protobuf import message_factory

from benchmarks.table import Table
from headwater import Event
from headwater.event import protobuf_data
from headwater.event.data_format import WriterSchema, data_format
from headwater.schema.schema import SchemaType
from headwater.schema.wire_format import decode_indexes

ROUNDS = 5
COUNT = 20_000


class Line(Event):
    sku: str
    quantity: int
    cents: int


class OrderPlaced(Event):
    order_id: str
    customer_id: str
    placed_at: datetime
    lines: list[Line]
    total_cents: int
    note: str | None = None


ORDER = OrderPlaced(
    "8f14e45f-ceea-467f-a8d0-1f3c5b7a9e11", "c-4711", datetime(2026, 1, 31, 8, tzinfo=UTC),
    [Line("sku-1", 2, 1999), Line("sku-2", 1, 4999)], 8997,
)  # fmt: skip


def rate(function: Callable[[], object]) -> float:
    """Calls a second."""
    started = time.perf_counter()
    for _ in range(COUNT):
        function()
    return COUNT / (time.perf_counter() - started)


def bare(kind: SchemaType, data: bytes) -> tuple[Callable[[], object], Callable[[], object]]:
    """Reading and writing by the library alone."""
    if kind is SchemaType.JSON:
        read = msgspec.json.Decoder(OrderPlaced).decode
        return (lambda: read(data)), (lambda: msgspec.json.encode(ORDER))
    if kind is SchemaType.AVRO:
        schema = fastavro.parse_schema(json.loads(data_format(kind).schema_of(OrderPlaced)))
        values = fastavro.schemaless_reader(io.BytesIO(data), schema, None)

        def write() -> bytes:
            out = io.BytesIO()
            fastavro.schemaless_writer(out, schema, values)
            return out.getvalue()

        return (lambda: fastavro.schemaless_reader(io.BytesIO(data), schema, None)), write
    derived = protobuf_data._Derivation(OrderPlaced)
    pool = protobuf_data._pool([derived.file])
    make = message_factory.GetMessageClass(pool.FindMessageTypeByName("OrderPlaced"))
    content = decode_indexes(data)[1]
    message = make.FromString(content)
    return (lambda: make.FromString(content)), message.SerializeToString


def run() -> None:
    table = Table("Events with schemas", ("bare library", "Event"))
    for kind in SchemaType:
        form = data_format(kind)
        write = form.writer(OrderPlaced)
        data = write(ORDER)
        read = form.reader(OrderPlaced, WriterSchema(form.schema_of(OrderPlaced), kind))
        assert read(data) == ORDER
        bare_read, bare_write = bare(kind, data)
        both: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "decode": (bare_read, functools.partial(read, data)),
            "encode": (bare_write, functools.partial(write, ORDER)),
        }
        for name, (theirs, ours) in both.items():
            values: dict[str, list[float]] = {"bare library": [], "Event": []}
            for _ in range(ROUNDS):
                values["bare library"].append(rate(theirs))
                values["Event"].append(rate(ours))
            table.add(f"{kind.lower()}, {name}", "1/s", values, "0.8" if name == "decode" else "")
    table.print()

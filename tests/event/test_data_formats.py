"""Classes of events as schemas, and data between versions of them: Avro, JSON Schema, Protobuf."""

import enum
import io
import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import fastavro
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from headwater import Event
from headwater.event.codec import Decoder, Framed, FramedDecoder, SchemaMissing, Undecodable, Unknown, encode
from headwater.event.data_format import NoSchema, Unencodable, WriterSchema, data_format
from headwater.event.envelope import Cause, Metadata
from headwater.schema import wire_format
from headwater.schema.avro import AvroSchema
from headwater.schema.json_schema import JsonSchema
from headwater.schema.protobuf import ProtobufSchema
from headwater.schema.schema import SchemaType

FORMATS = list(SchemaType)
PARSERS = {SchemaType.AVRO: AvroSchema, SchemaType.JSON: JsonSchema, SchemaType.PROTOBUF: ProtobufSchema}


class Colour(enum.Enum):
    RED = "RED"
    BLUE = "BLUE"


class Size(enum.Enum):
    SMALL = 1
    LARGE = 2


class Line(Event):
    sku_id: str
    count: int


@dataclass
class Address:
    street: str
    town: str | None = None


class OrderPlaced(Event):
    event_namespace = "shop.orders"

    order_id: str
    lines: list[Line]
    placed_at: datetime
    day: date
    at: time
    id: UUID
    price: Annotated[Decimal, msgspec.Meta(extra={"precision": 12, "scale": 2})]
    by_name: dict[str, Line]
    times: dict[str, datetime]
    address: Address
    other: Line | None = None
    colour: Colour = Colour.RED
    size: Size = Size.SMALL
    kind: Literal["new", "used"] = "new"
    note: str | None = None
    first: str | None = "x"
    tags: list[str] = []
    blob: bytes = b"\xff"
    ratio: float = 0.5
    is_gift: bool = False


MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(UTC))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LINES = st.builds(Line, sku_id=TEXT, count=st.integers(-(2**63), 2**63 - 1))
ORDERS = st.builds(
    OrderPlaced,
    order_id=TEXT,
    lines=st.lists(LINES, max_size=3),
    placed_at=MOMENTS,
    day=st.dates(date(1970, 1, 1), date(2200, 1, 1)),
    at=st.times(),
    id=st.uuids(),
    price=st.decimals(-(10**9), 10**9, places=2, allow_nan=False),
    by_name=st.dictionaries(TEXT, LINES, max_size=3),
    times=st.dictionaries(TEXT, MOMENTS, max_size=3),
    address=st.builds(Address, street=TEXT, town=st.none() | TEXT),
    other=st.none() | LINES,
    colour=st.sampled_from(Colour),
    size=st.sampled_from(Size),
    kind=st.sampled_from(["new", "used"]),
    note=st.none() | TEXT,
    first=TEXT,
    tags=st.lists(TEXT, max_size=3),
    blob=st.binary(max_size=20),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    is_gift=st.booleans(),
)


@pytest.mark.parametrize("kind", FORMATS)
@given(order=ORDERS)
def test_what_is_written_is_read_back(kind: SchemaType, order: OrderPlaced) -> None:
    """Any event of a class with every kind of field, in all three formats."""
    form = data_format(kind)
    schema = WriterSchema(form.schema_of(OrderPlaced), kind)
    assert form.reader(OrderPlaced, schema)(form.writer(OrderPlaced)(order)) == order


@pytest.mark.parametrize("kind", FORMATS)
def test_a_class_s_schema_is_a_schema_and_says_its_name(kind: SchemaType) -> None:
    """The registry's own parsers take it, and written data names its type."""
    form = data_format(kind)
    text = form.schema_of(OrderPlaced)
    PARSERS[kind](text, {})
    event = Line("a", 1)
    line = WriterSchema(form.schema_of(Line), kind)
    assert form.name_of(line, form.writer(Line)(event)) == "Line"
    assert form.plain_reader(line)(form.writer(Line)(event)) == {"skuId": "a", "count": 1}


def test_avro_has_namespace_logical_types_and_defaults() -> None:
    node = json.loads(data_format(SchemaType.AVRO).schema_of(OrderPlaced))
    fields = {field["name"]: field for field in node["fields"]}
    assert (node["name"], node["namespace"]) == ("OrderPlaced", "shop.orders")
    assert fields["placedAt"]["type"] == {"type": "long", "logicalType": "timestamp-micros"}
    assert fields["price"]["type"] == {"type": "bytes", "logicalType": "decimal", "precision": 12, "scale": 2}
    assert fields["byName"]["type"] == {"type": "map", "values": "Line"}
    assert (fields["note"]["type"], fields["note"]["default"]) == (["null", "string"], None)
    assert (fields["first"]["type"], fields["first"]["default"]) == (["string", "null"], "x")
    assert fields["blob"]["default"] == "\xff"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_field_with_a_default_may_come_and_another_may_go(kind: SchemaType) -> None:
    """The new class reads old data, and the old class new data; the registry's rules say so for the first."""

    class Order(Event):
        order_id: str
        note: str | None = None

    class Newer(Event):
        order_id: str
        note: str | None = None
        currency: str | None = None

    Newer.__name__ = Newer.__qualname__ = "Order"
    form = data_format(kind)
    old, new = (WriterSchema(form.schema_of(cls), kind) for cls in (Order, Newer))
    assert PARSERS[kind](new.text, {}).differences(PARSERS[kind](old.text, {})) == []  # type: ignore[arg-type]
    assert form.reader(Newer, old)(form.writer(Order)(Order("o", "n"))) == Newer("o", "n", None)
    assert form.reader(Order, new)(form.writer(Newer)(Newer("o", "n", "USD"))) == Order("o", "n")


def test_avro_data_of_a_narrower_type_is_promoted() -> None:
    """A foreign writer's int and bytes are read as long and string."""
    schema = {
        "type": "record",
        "name": "Line",
        "fields": [{"name": "skuId", "type": "bytes"}, {"name": "count", "type": "int"}],
    }
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), {"skuId": b"a", "count": 5})
    read = data_format(SchemaType.AVRO).reader(Line, WriterSchema(json.dumps(schema), SchemaType.AVRO))
    assert read(out.getvalue()) == Line("a", 5)


def test_avro_schemas_may_reference_others() -> None:
    """A record of another subject, by its name."""
    line = {
        "type": "record",
        "name": "Line",
        "fields": [{"name": "skuId", "type": "string"}, {"name": "count", "type": "long"}],
    }
    order = {"type": "record", "name": "Basket", "fields": [{"name": "line", "type": "Line"}]}

    class Basket(Event):
        line: Line

    schema = WriterSchema(json.dumps(order), SchemaType.AVRO, {"Line": json.dumps(line)})
    form = data_format(SchemaType.AVRO)
    assert form.reader(Basket, schema)(form.writer(Basket)(Basket(Line("a", 1)))) == Basket(Line("a", 1))


@pytest.mark.parametrize("kind", [SchemaType.AVRO, SchemaType.PROTOBUF])
@pytest.mark.parametrize("field", [Any, object, dict[int, str], tuple[int, str], timedelta, str | bytes])
def test_what_a_format_can_not_hold_is_refused_with_the_field(kind: SchemaType, field: Any) -> None:
    """At the start, not when the first event is written."""
    cls = msgspec.defstruct("Odd", [("x", field)])
    with pytest.raises(NoSchema, match=r"Odd"):
        data_format(kind).schema_of(cls)


@pytest.mark.parametrize("kind", [SchemaType.AVRO, SchemaType.PROTOBUF])
def test_a_time_without_a_zone_is_refused(kind: SchemaType) -> None:
    """Both libraries would guess one."""

    class Seen(Event):
        at: list[datetime]

    with pytest.raises(Unencodable, match="zone"):
        data_format(kind).writer(Seen)(Seen([datetime(2026, 1, 1)]))


@pytest.mark.parametrize("kind", [SchemaType.AVRO, SchemaType.PROTOBUF])
def test_a_number_that_the_schema_can_not_hold_is_refused(kind: SchemaType) -> None:
    with pytest.raises(Unencodable, match="Line"):
        data_format(kind).writer(Line)(Line("a", 2**70))


def test_pydantic_models_have_json_schemas_and_no_others() -> None:
    class Model(BaseModel):
        order_id: str
        count: int = 1

    form = data_format(SchemaType.JSON)
    assert json.loads(form.schema_of(Model))["additionalProperties"] is False
    assert form.reader(Model, WriterSchema(form.schema_of(Model), SchemaType.JSON))(
        form.writer(Model)(Model(order_id="o"))
    ) == Model(order_id="o")
    for kind in (SchemaType.AVRO, SchemaType.PROTOBUF):
        with pytest.raises(NoSchema, match=r"headwater\.Event"):
            data_format(kind).schema_of(Model)


def test_protobuf_numbers_are_given_in_order_or_by_hand() -> None:
    class Moved(Event):
        a: str
        b: Annotated[str, msgspec.Meta(extra={"number": 7})]
        c: str

    text = data_format(SchemaType.PROTOBUF).schema_of(Moved)
    assert [line.strip() for line in text.split("\n") if "= " in line][1:] == [
        "string a = 1;", "string b = 7;", "string c = 8;",
    ]  # fmt: skip

    class Twice(Event):
        a: str
        b: Annotated[str, msgspec.Meta(extra={"number": 1})]

    with pytest.raises(NoSchema, match="number 1"):
        data_format(SchemaType.PROTOBUF).schema_of(Twice)


# The value with its id


@given(indexes=st.lists(st.integers(0, 2**31), min_size=1, max_size=20), rest=st.binary(max_size=20))
def test_message_indexes_round_trip(indexes: list[int], rest: bytes) -> None:
    assert wire_format.decode_indexes(wire_format.encode_indexes(indexes) + rest) == (indexes, rest)


@given(st.binary(max_size=30))
def test_garbage_is_not_framed_or_has_an_id(value: bytes) -> None:
    try:
        id, rest = wire_format.unframe(value)
    except wire_format.NotFramed:
        return
    assert wire_format.frame(id, rest) == value


CAUSE = Cause("story", "before", Metadata("u-1", "s-1"))


def framed_order(kind: SchemaType = SchemaType.AVRO) -> tuple[Any, FramedDecoder]:
    form = data_format(kind)
    encoded = encode(Line("a", 1), "shop", CAUSE, None, Framed(7, kind, form.writer(Line)))
    return encoded, FramedDecoder([Line], kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_envelope_travels_in_the_headers(kind: SchemaType) -> None:
    """Everything of the envelope comes back; the schema is asked for once."""
    encoded, decoder = framed_order(kind)
    with pytest.raises(SchemaMissing) as missing:
        decoder.decode(encoded.value, encoded.headers, "t:0:1", 0)
    assert missing.value.id == 7
    decoder.learn(7, WriterSchema(data_format(kind).schema_of(Line), kind))
    envelope = decoder.decode(encoded.value, encoded.headers, "t:0:1", 0)
    assert (envelope.event_id, envelope.event_type, envelope.data) == (encoded.event_id, "Line", Line("a", 1))
    assert (envelope.source, envelope.correlation_id, envelope.causation_id) == ("shop", "story", "before")
    assert envelope.metadata == Metadata("u-1", "s-1")
    assert abs(envelope.timestamp - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("headers", "event_id"),
    [
        ([("headwater-event-id", b"ours"), ("ce_id", b"cloud"), ("id", b"debezium")], "ours"),
        ([("ce_id", b"cloud"), ("id", b"debezium")], "cloud"),
        ([("id", b"debezium")], "debezium"),
        ([], "t:0:1"),
    ],
)
def test_an_event_of_somebody_else_has_an_id_all_the_same(headers: Any, event_id: str) -> None:
    """Ours, then CloudEvents', then Debezium's, then its place; its type is its schema's name."""
    encoded, decoder = framed_order()
    decoder.learn(7, WriterSchema(data_format(SchemaType.AVRO).schema_of(Line), SchemaType.AVRO))
    envelope = decoder.decode(encoded.value, headers, "t:0:1", 1_700_000_000_000)
    assert (envelope.event_id, envelope.data) == (event_id, Line("a", 1))
    assert envelope.timestamp == datetime.fromtimestamp(1_700_000_000, UTC)


def test_what_is_not_for_us_or_makes_no_sense_is_told_apart() -> None:
    encoded, decoder = framed_order()
    with pytest.raises(Unknown):
        decoder.decode(encoded.value, [("headwater-event-type", b"Other")], "t:0:1", 0)
    with pytest.raises(Undecodable, match="id of a schema"):
        decoder.decode(b'{"a": 1}', [], "t:0:1", 0)
    decoder.learn(7, WriterSchema('{"type":"record","name":"Other","fields":[]}', SchemaType.AVRO))
    with pytest.raises(Unknown):
        decoder.decode(encoded.value, [], "t:0:1", 0)
    with pytest.raises(Undecodable, match="Line"):
        decoder.decode(encoded.value, encoded.headers, "t:0:1", 0)
    decoder.learn(8, WriterSchema(data_format(SchemaType.JSON).schema_of(Line), SchemaType.JSON))
    with pytest.raises(Undecodable, match="JSON"):
        decoder.decode(wire_format.frame(8, b"{}"), [], "t:0:1", 0)


@given(data=st.binary(max_size=60), kind=st.sampled_from(FORMATS))
def test_garbage_behind_an_id_is_undecodable(data: bytes, kind: SchemaType) -> None:
    """Never another error, whatever the bytes are."""
    decoder = FramedDecoder([OrderPlaced], kind)
    decoder.learn(1, WriterSchema(data_format(kind).schema_of(OrderPlaced), kind))
    with suppress(Undecodable):
        decoder.decode(wire_format.frame(1, data), [("headwater-event-type", b"OrderPlaced")], "t:0:1", 0)


# Older versions


def euros(data: dict[str, Any]) -> dict[str, Any]:
    return {"orderId": data["orderId"], "cents": round(data["euros"] * 100)}


def with_currency(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "currency": "EUR"}


class Paid(Event):
    event_version = "v3"
    upcasts = {"v1": euros, "v2": with_currency}

    order_id: str
    cents: int
    currency: str


class PaidV1(Event):
    order_id: str
    euros: float


class PaidV2(Event):
    order_id: str
    cents: int


PaidV1.__name__ = PaidV2.__name__ = "Paid"
PaidV1.event_version, PaidV2.event_version = "v1", "v2"


@pytest.mark.parametrize("kind", [*FORMATS, None])
@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (PaidV1("o", 12.5), Paid("o", 1250, "EUR")),
        (PaidV2("o", 7), Paid("o", 7, "EUR")),
        (Paid("o", 7, "USD"), Paid("o", 7, "USD")),
    ],
)
def test_older_versions_are_upcast_one_after_the_other(kind: SchemaType | None, event: Any, expected: Paid) -> None:
    """From the version that it has to the newest, in all formats; a handler sees the newest only."""
    if kind is None:
        value = encode(event, "shop", CAUSE).value
        assert value is not None
        assert Decoder([Paid]).decode(value).data == expected
        return
    form = data_format(kind)
    encoded = encode(event, "shop", CAUSE, None, Framed(7, kind, form.writer(type(event))))
    assert encoded.value is not None
    decoder = FramedDecoder([Paid], kind)
    decoder.learn(7, WriterSchema(form.schema_of(type(event)), kind))
    assert decoder.decode(encoded.value, encoded.headers, "t:0:1", 0).data == expected


class Seen(Event):
    event_version = "v2"
    upcasts = {"v1": lambda data: {**data, "place": "home"}}

    at: datetime
    blob: bytes
    place: str


class SeenV1(Event):
    at: datetime
    blob: bytes


SeenV1.__name__ = "Seen"


@pytest.mark.parametrize("kind", [*FORMATS, None])
def test_upcasts_keep_times_and_bytes(kind: SchemaType | None) -> None:
    """Whether the format has them as text or as they are."""
    old, new = (
        SeenV1(datetime(2026, 1, 1, tzinfo=UTC), b"\xff"),
        Seen(datetime(2026, 1, 1, tzinfo=UTC), b"\xff", "home"),
    )
    if kind is None:
        assert Decoder([Seen]).decode(encode(old, "shop", CAUSE).value or b"").data == new
        return
    form = data_format(kind)
    encoded = encode(old, "shop", CAUSE, None, Framed(7, kind, form.writer(SeenV1)))
    decoder = FramedDecoder([Seen], kind)
    decoder.learn(7, WriterSchema(form.schema_of(SeenV1), kind))
    assert decoder.decode(encoded.value or b"", encoded.headers, "t:0:1", 0).data == new


class Wish(Event):
    text: str | None
    other: str | None = "x"
    line: Line | None = Line("q", 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_none_is_none_whatever_the_default_is(kind: SchemaType) -> None:
    form = data_format(kind)
    read = form.reader(Wish, WriterSchema(form.schema_of(Wish), kind))
    for wish in (Wish(None, None, None), Wish("a", "b", Line("c", 2)), Wish(None)):
        assert read(form.writer(Wish)(wish)) == wish


def test_protobuf_goes_by_numbers() -> None:
    """A field of another name is the same; one that the writer didn't have is zero, as proto3 says."""

    class Named(Event):
        name: str

    class Renamed(Event):
        full_name: str
        count: int
        tags: list[str]

    Renamed.__name__ = Renamed.__qualname__ = "Named"
    form = data_format(SchemaType.PROTOBUF)
    read = form.reader(Renamed, WriterSchema(form.schema_of(Named), SchemaType.PROTOBUF))
    assert read(form.writer(Named)(Named("ada"))) == Renamed("ada", 0, [])


def test_an_upcast_that_fails_is_undecodable() -> None:
    value = encode(msgspec.structs.replace(PaidV1("o", 1.0)), "shop", CAUSE).value
    assert value is not None
    with pytest.raises(Undecodable, match="Paid"):
        Decoder([Paid]).decode(value.replace(b'"euros"', b'"dollars"'))

"""Which schema reads what another one wrote, in the three formats; Avro's verdicts beside those of the `avro` package."""

import json
from typing import Any

import avro.compatibility
import avro.schema
import fastavro
import jsonschema_rs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headwater.schema.avro import AvroSchema
from headwater.schema.json_schema import JsonSchema
from headwater.schema.protobuf import ProtobufSchema
from headwater.schema.schema import InvalidSchema


def kinds(reader: Any, writer: Any) -> list[str]:
    return sorted(difference.kind for difference in reader.differences(writer))


# Avro


def record(*fields: dict[str, object], **more: object) -> AvroSchema:
    return AvroSchema(json.dumps({"type": "record", "name": "R", "fields": list(fields), **more}), {})


INT, LONG = {"name": "a", "type": "int"}, {"name": "a", "type": "long"}


@pytest.mark.parametrize(
    ("reader", "writer", "expected"),
    [
        (record(LONG), record(INT), []),
        (record(INT), record(LONG), ["TYPE_MISMATCH"]),
        (record(INT, {"name": "b", "type": "int"}), record(INT), ["READER_FIELD_MISSING_DEFAULT_VALUE"]),
        (record(INT, {"name": "b", "type": "int", "default": 1}), record(INT), []),
        (record(), record(INT), []),
        (record({"name": "b", "type": "int", "aliases": ["a"]}), record(INT), []),
        (record({"name": "a", "type": ["null", "int"]}), record(INT), []),
        (record(INT), record({"name": "a", "type": ["null", "int"]}), ["TYPE_MISMATCH"]),
        (record({"name": "a", "type": ["null", "string"]}), record(INT), ["MISSING_UNION_BRANCH"]),
        (
            record({"name": "a", "type": {"type": "enum", "name": "E", "symbols": ["X"]}}),
            record({"name": "a", "type": {"type": "enum", "name": "E", "symbols": ["X", "Y"]}}),
            ["MISSING_ENUM_SYMBOLS"],
        ),
        (
            record({"name": "a", "type": {"type": "enum", "name": "E", "symbols": ["X"], "default": "X"}}),
            record({"name": "a", "type": {"type": "enum", "name": "E", "symbols": ["X", "Y"]}}),
            [],
        ),
        (
            record({"name": "a", "type": {"type": "fixed", "name": "F", "size": 4}}),
            record({"name": "a", "type": {"type": "fixed", "name": "F", "size": 8}}),
            ["FIXED_SIZE_MISMATCH"],
        ),
        (record(INT, name="S"), record(INT), ["NAME_MISMATCH"]),
        (record(INT, name="S", aliases=["R"]), record(INT), []),
    ],
)
def test_avro_follows_the_rules_of_resolution(reader: AvroSchema, writer: AvroSchema, expected: list[str]) -> None:
    """S004.10: fields by name or alias, defaults, promotions, unions, enums, fixed, names."""
    assert kinds(reader, writer) == expected


def test_an_avro_type_inside_itself_is_compared_once() -> None:
    """A tree that grew a field without a default: one difference, and an end."""
    old = {"type": "record", "name": "T", "fields": [{"name": "next", "type": ["null", "T"], "default": None}]}
    new = {**old, "fields": [*old["fields"], {"name": "size", "type": "int"}]}

    (difference,) = AvroSchema(json.dumps(new), {}).differences(AvroSchema(json.dumps(old), {}))
    assert (difference.kind, difference.path, difference.info) == (
        "READER_FIELD_MISSING_DEFAULT_VALUE", "/fields/1", "size",
    )  # fmt: skip


primitives = st.sampled_from(["null", "boolean", "int", "long", "float", "double", "bytes", "string"])
enums = st.lists(st.sampled_from("ABCD"), min_size=1, unique=True).map(
    lambda symbols: {"type": "enum", "name": "E", "symbols": symbols}
)
DEFAULTS: dict[str, object] = {"null": None, "boolean": True, "int": 1, "long": 1, "float": 1.0, "double": 1.0,
                               "bytes": "b", "string": "s"}  # fmt: skip


@st.composite
def types(draw: st.DrawFn, depth: int = 2) -> Any:
    kind = draw(st.sampled_from(["primitive", "enum", "array", "map", "union", "record"] if depth else ["primitive"]))
    if kind == "primitive":
        return draw(primitives)
    if kind == "enum":
        return draw(enums)
    if kind in ("array", "map"):
        return {"type": kind, "items" if kind == "array" else "values": draw(types(depth - 1))}
    if kind == "union":
        return draw(st.lists(primitives, min_size=1, max_size=3, unique=True))
    names = draw(st.lists(st.sampled_from("xyz"), unique=True))
    fields = []
    for name in names:
        field = {"name": name, "type": draw(types(0))}
        if draw(st.booleans()):
            field["default"] = DEFAULTS[field["type"]]
        fields.append(field)
    return {"type": "record", "name": "R", "fields": fields}


@given(types(), types())
def test_avro_verdicts_are_those_of_the_avro_package(reader: Any, writer: Any) -> None:
    """For any pair of schemas: the same yes or no."""
    texts = [json.dumps(reader), json.dumps(writer)]
    try:
        parsed = [avro.schema.parse(text) for text in texts]
        ours = [AvroSchema(text, {}) for text in texts]
    except (avro.schema.SchemaParseException, avro.errors.AvroException, InvalidSchema):
        assume(False)
    checker = avro.compatibility.ReaderWriterCompatibilityChecker()
    verdict = checker.get_compatibility(parsed[0], parsed[1]).compatibility
    compatible = avro.compatibility.SchemaCompatibilityType.compatible
    assert (not ours[0].differences(ours[1])) == (verdict is compatible)


@given(types())
def test_the_kept_form_of_an_avro_schema_means_the_same(schema: Any) -> None:
    """Whatever the order of its keys: one text, which reads what the given one wrote, and is kept as it is."""
    try:
        first = AvroSchema(json.dumps(schema), {})
    except InvalidSchema:
        assume(False)
    again = AvroSchema(json.dumps(_reversed(schema)), {})
    assert first.text == again.text == AvroSchema(first.text, {}).text
    assert fastavro.schema.to_parsing_canonical_form(json.loads(first.text)) == (
        fastavro.schema.to_parsing_canonical_form(schema)
    )


def _reversed(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _reversed(node[name]) for name in reversed(node)}
    return [_reversed(each) for each in node] if isinstance(node, list) else node


# JSON Schema


def schema(**properties: object) -> JsonSchema:
    return JsonSchema(json.dumps({"type": "object", **properties}), {})


CLOSED = {"additionalProperties": False}
A = {"properties": {"a": {"type": "integer"}}}
AB = {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}


ANY: dict[str, Any] = {"anyOf": [{"$ref": "#/$defs/d"}, {"type": "null"}]}
NOT: dict[str, Any] = {"not": {"$ref": "#/$defs/d"}}
BESIDE: dict[str, Any] = {"$ref": "#/$defs/d", "multipleOf": 2}


def of_definition(definition: object, a: dict[str, Any]) -> JsonSchema:
    """The same text but for the definition that a property refers to."""
    return schema(properties={"a": a}, **{"$defs": {"d": definition}})


def in_another(definition: object) -> JsonSchema:
    """Behind a reference, where `#` is the other document."""
    other = {"$defs": {"d": definition}, "properties": {"b": {"$ref": "#/$defs/d"}}}
    return JsonSchema(json.dumps({"$ref": "other.json"}), {"other.json": json.dumps(other)})


def with_a_space(definition: object) -> JsonSchema:
    return schema(properties={"a": {"$ref": "#/$defs/a%20d"}}, **{"$defs": {"a d": definition}})


@pytest.mark.parametrize(
    ("reader", "writer", "expected"),
    [
        (schema(**AB, **CLOSED), schema(**A, **CLOSED), []),
        (schema(**AB), schema(**A), ["PROPERTY_ADDED_TO_OPEN_CONTENT_MODEL"]),
        (schema(**A), schema(**AB), []),
        (schema(**A, **CLOSED), schema(**AB, **CLOSED), ["PROPERTY_REMOVED_FROM_CLOSED_CONTENT_MODEL"]),
        (schema(**AB, **CLOSED, required=["b"]), schema(**A, **CLOSED), ["REQUIRED_ATTRIBUTE_ADDED"]),
        (schema(properties={"a": {"type": "number"}}), schema(**A), []),
        (schema(**A), schema(properties={"a": {"type": "number"}}), ["TYPE_CHANGED"]),
        (schema(properties={"a": {"type": ["integer", "null"]}}), schema(**A), []),
        (schema(**A), schema(properties={"a": {"type": ["integer", "null"]}}), ["TYPE_NARROWED"]),
        (schema(properties={"a": {"type": "integer", "maximum": 5}}), schema(**A), ["MAXIMUM_ADDED"]),
        (
            schema(properties={"a": {"type": "integer", "maximum": 5}}),
            schema(properties={"a": {"type": "integer", "maximum": 9}}),
            ["MAXIMUM_DECREASED"],
        ),
        (schema(properties={"a": {"enum": [1, 2]}}), schema(properties={"a": {"enum": [1]}}), []),
        (schema(properties={"a": {"enum": [1]}}), schema(properties={"a": {"enum": [1, 2]}}), ["ENUM_ARRAY_NARROWED"]),
        (
            schema(properties={"a": {"type": "array", "items": {"type": "string"}}}),
            schema(properties={"a": {"type": "array", "items": {"type": "integer"}}}),
            ["TYPE_CHANGED"],
        ),
        (
            schema(properties={"a": {"oneOf": [{"type": "string"}, {"type": "null"}]}}),
            schema(properties={"a": {"type": "string"}}),
            [],
        ),
        (
            schema(properties={"a": {"oneOf": [{"type": "string"}]}}),
            schema(properties={"a": {"oneOf": [{"type": "string"}, {"type": "null"}]}}),
            ["SUM_TYPE_NARROWED"],
        ),
        (
            schema(properties={"a": {"$ref": "#/$defs/n"}}, **{"$defs": {"n": {"type": "integer"}}}),
            schema(**A),
            [],
        ),
        (of_definition({"type": "integer"}, ANY), of_definition({"type": "integer"}, ANY), []),
        (of_definition({"type": "integer"}, ANY), of_definition({"type": "string"}, ANY), ["SUM_TYPE_NARROWED"]),
        (of_definition({"type": "number"}, ANY), of_definition({"type": "integer"}, ANY), []),
        (of_definition({"type": "integer"}, NOT), of_definition({"type": "integer"}, NOT), []),
        (of_definition({"type": "integer"}, NOT), of_definition({"type": "string"}, NOT), ["NOT_TYPE_CHANGED"]),
        (of_definition({"maximum": 5}, BESIDE), of_definition({"maximum": 5}, BESIDE), []),
        (
            of_definition({"maximum": 5}, BESIDE),
            of_definition({"maximum": 5}, {"$ref": "#/$defs/d"}),
            ["MULTIPLE_OF_CHANGED"],
        ),
        (
            schema(**AB, unevaluatedProperties=False),
            schema(**AB),
            ["UNEVALUATED_PROPERTIES_ADDED"],
        ),
        (
            schema(properties={"a": {"type": "array", "contains": {"type": "string"}, "minContains": 2}}),
            schema(properties={"a": {"type": "array", "contains": {"type": "string"}}}),
            ["CONTAINS_ADDED"],
        ),
        (
            schema(**A, **CLOSED, patternProperties={"^a": {"type": "integer", "maximum": 5}}),
            schema(**A, **CLOSED),
            ["MAXIMUM_ADDED"],
        ),
        (
            JsonSchema(
                '{"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 5, "exclusiveMaximum": true}', {}
            ),
            JsonSchema('{"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 5}', {}),
            ["EXCLUSIVE_MAXIMUM_ADDED"],
        ),
        (in_another({"type": "integer"}), in_another({"type": "integer"}), []),
        (in_another({"type": "integer"}), in_another({"type": "string"}), ["TYPE_CHANGED"]),
        (with_a_space({"type": "integer"}), with_a_space({"type": "string"}), ["TYPE_CHANGED"]),
    ],
)
def test_json_schema_takes_what_every_old_document_fits(
    reader: JsonSchema, writer: JsonSchema, expected: list[str]
) -> None:
    """S004.10: open and closed objects, required, types, bounds, enums, items, sums, references."""
    assert kinds(reader, writer) == expected


def test_a_json_schema_inside_itself_is_compared_to_an_end() -> None:
    """A tree that refers to its own root."""
    tree = schema(properties={"next": {"$ref": "#"}, "a": {"type": "integer"}}, **CLOSED)
    other = schema(properties={"next": {"$ref": "#"}, "a": {"type": "string"}}, **CLOSED)

    assert kinds(tree, tree) == []
    assert kinds(tree, other) == ["TYPE_CHANGED"]


documents = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "x", "long text"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def json_schemas(draw: st.DrawFn, depth: int = 2) -> Any:
    node: dict[str, Any] = {}
    if draw(st.integers(0, 4)) == 0:
        return {"$ref": draw(st.sampled_from(["#/$defs/d", "#/$defs/e"]))}
    kind = draw(st.sampled_from(["integer", "number", "string", "boolean", "null", "object", "array", None]))
    if kind is not None:
        node["type"] = kind
    if kind == "string" and draw(st.booleans()):
        node["maxLength"] = draw(st.integers(0, 5))
    if kind in ("integer", "number") and draw(st.booleans()):
        node["minimum"] = draw(st.integers(-2, 2))
    if kind == "object" and depth:
        node["properties"] = draw(st.dictionaries(st.sampled_from("abc"), json_schemas(depth - 1), max_size=2))
        node["required"] = draw(st.lists(st.sampled_from("abc"), unique=True, max_size=1))
        node["additionalProperties"] = draw(st.booleans() | json_schemas(0))
        node["patternProperties"] = draw(st.dictionaries(st.sampled_from(["^a", "b"]), json_schemas(0), max_size=1))
    if kind == "array" and depth:
        node["items"] = draw(json_schemas(depth - 1))
    if kind is None and depth and draw(st.booleans()):
        node[draw(st.sampled_from(["anyOf", "allOf"]))] = draw(
            st.lists(json_schemas(depth - 1), min_size=1, max_size=2)
        )
    if depth and draw(st.integers(0, 5)) == 0:
        node["not"] = draw(json_schemas(0))
    return node


@st.composite
def definitions(draw: st.DrawFn) -> Any:
    """Of what schemas refer to; the second may refer to the first."""
    kinds_of_leaf = st.sampled_from([{"type": "integer"}, {"type": "string"}, {"type": "null"}, {}, {"maxLength": 2}])
    first = draw(kinds_of_leaf)
    second = draw(kinds_of_leaf | st.just({"anyOf": [{"$ref": "#/$defs/d"}, {"type": "boolean"}]}))
    return {"d": first, "e": second}


@given(
    json_schemas(),
    json_schemas(),
    st.booleans(),
    definitions(),
    definitions(),
    st.lists(documents, min_size=10, max_size=20),
)
def test_a_document_that_fitted_fits_if_nothing_stands_against_it(
    reader: Any, writer: Any, is_same: bool, new_ones: Any, old_ones: Any, found: list[Any]
) -> None:
    """What the check lets through is safe: no document of the writer's fails with the reader. is_same: but for what they refer
    to."""
    reader, writer = {**reader, "$defs": new_ones}, {**(reader if is_same else writer), "$defs": old_ones}
    new, old = JsonSchema(json.dumps(reader), {}), JsonSchema(json.dumps(writer), {})
    if not new.differences(old):
        for document in found:
            assert jsonschema_rs.is_valid(reader, document) or not jsonschema_rs.is_valid(writer, document)


# Protobuf


def proto(body: str, syntax: str = "proto3") -> ProtobufSchema:
    return ProtobufSchema(f'syntax = "{syntax}"; {body}', {})


@pytest.mark.parametrize(
    ("reader", "writer", "expected"),
    [
        ("message A { int32 a = 1; string b = 2; }", "message A { int32 a = 1; }", []),
        ("message A { }", "message A { int32 a = 1; }", []),
        ("message A { int64 a = 1; }", "message A { int32 a = 1; }", []),
        ("message A { int32 other = 1; }", "message A { int32 a = 1; }", []),
        ("message A { string a = 1; }", "message A { int32 a = 1; }", ["FIELD_SCALAR_KIND_CHANGED"]),
        ("message A { sint32 a = 1; }", "message A { int32 a = 1; }", ["FIELD_SCALAR_KIND_CHANGED"]),
        ("message A { B a = 1; } message B {}", "message A { int32 a = 1; } message B {}", ["FIELD_KIND_CHANGED"]),
        ("message A { bytes a = 1; }", "message A { string a = 1; }", []),
        ("message A { repeated int32 a = 1; }", "message A { int32 a = 1; }", ["FIELD_NUMERIC_LABEL_CHANGED"]),
        ("message B { }", "message A { int32 a = 1; }", ["MESSAGE_REMOVED"]),
        ("message A { oneof x { int32 a = 1; } }", "message A { int32 a = 1; }", []),
        (
            "message A { oneof x { int32 a = 1; int32 b = 2; } }",
            "message A { int32 a = 1; int32 b = 2; }",
            ["MULTIPLE_FIELDS_MOVED_TO_ONEOF"],
        ),
        (
            "message A { oneof x { int32 a = 1; } }",
            "message A { oneof x { int32 a = 1; int32 b = 2; } }",
            ["ONEOF_FIELD_REMOVED"],
        ),
        (
            "message A { map<string, int32> m = 1; }",
            "message A { map<string, string> m = 1; }",
            ["FIELD_SCALAR_KIND_CHANGED"],
        ),
    ],
)
def test_protobuf_goes_by_numbers_and_their_encoding(reader: str, writer: str, expected: list[str]) -> None:
    """S004.10: fields come and go by number; types may change within their group on the wire."""
    assert kinds(proto(reader), proto(writer)) == expected


def test_required_fields_of_proto2_can_not_come_or_go() -> None:
    with_it, without = "message A { required int32 a = 1; }", "message A { optional int32 b = 2; }"

    assert kinds(proto(with_it, "proto2"), proto(without, "proto2")) == ["REQUIRED_FIELD_ADDED"]
    assert kinds(proto(without, "proto2"), proto(with_it, "proto2")) == ["REQUIRED_FIELD_REMOVED"]


def test_a_proto_file_is_kept_in_one_form_with_its_comments() -> None:
    """... however it was given, and what protoc makes of it is what it made of the given one."""
    text = """syntax = "proto3"; package shop.v1; import "google/protobuf/timestamp.proto";
    option java_package = "x.y";
    // An order.
    message Order { reserved 4, 7 to 9; reserved "old"; string id = 1; /* lines */
      repeated Line lines = 2 [packed = false, deprecated = true]; map<string, Line> by_name = 3;
      google.protobuf.Timestamp at = 5; optional int32 note = 6;
      oneof pay { string card = 10; string cash = 11; }
      message Line { double price = 1 [json_name = "p"]; State state = 2; enum State { NEW = 0; OLD = 1; } } }
    service Orders { rpc Watch (Order) returns (stream Order); }"""
    first = ProtobufSchema(text, {})
    again = ProtobufSchema(first.text, {})
    serialized = ProtobufSchema(first.serialized(), {})

    assert first.text == again.text
    assert first.serialized() == again.serialized() == serialized.serialized()
    assert "// An order." in first.text
    assert kinds(first, again) == []


@pytest.mark.parametrize(
    ("make", "text", "says"),
    [
        (AvroSchema, "{", "no JSON"),
        (AvroSchema, '{"type":"record","name":"R"}', "fields"),
        (AvroSchema, '{"type":"record","name":"R","fields":[{"name":"a","type":"Nope"}]}', "Nope"),
        (AvroSchema, '{"type":"record","name":"R","fields":[{"name":"a-b","type":"int"}]}', "a-b"),
        (
            AvroSchema,
            '{"type":"record","name":"R","fields":[{"name":"a","type":"int"},{"name":"a","type":"int"}]}',
            "a",
        ),
        (AvroSchema, '{"type":"record","name":"R","fields":[{"name":"a","type":"int","default":"x"}]}', "default"),
        (AvroSchema, '["int","int"]', ""),
        (AvroSchema, "[" * 5000 + "]" * 5000, ""),
        (AvroSchema, '{"type":"array","items":' * 200 + '"int"' + "}" * 200, "nested more than"),
        (JsonSchema, "[]", "an object, true or false"),
        (JsonSchema, '{"type":"nope"}', ""),
        (JsonSchema, '{"$ref":"https://127.0.0.1:1/x.json"}', "none of its references"),
        (JsonSchema, '{"not":' * 200 + "{}" + "}" * 200, "nested more than"),
        (ProtobufSchema, 'syntax = "proto3"; message A { int32 a = ; }', "line 1"),
        (ProtobufSchema, 'syntax = "proto3"; import "/etc/passwd";', "passwd"),
        (ProtobufSchema, 'syntax = "proto3"; message A { Nope a = 1; }', "not defined"),
    ],
)
def test_what_is_no_schema_is_said(make: Any, text: str, says: str) -> None:
    """Invalid, unknown, recursive, too deep: an error that says what, and nothing fetched from anywhere."""
    with pytest.raises(InvalidSchema) as error:
        make(text, {}).check_new()
    assert says in str(error.value)

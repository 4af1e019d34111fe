"""Avro: validity by the `avro` package, and the rules by which one schema reads what another one wrote.

The rules are those of the specification (1.12, "Schema Resolution"): fields by name or alias, defaults for what the
writer didn't have, the promotions int -> long -> float -> double and string <-> bytes, unions branch by branch, enums by
their symbols or a default. Each difference says where it is and what it needs. The package decides the same (the tests
compare them), but gives its messages and its places as two sets that don't belong together.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import avro.schema
from avro.errors import AvroException
from avro.name import Names

from headwater.schema.schema import MAX_DEPTH, Difference, InvalidSchema

PRIMITIVES = {"null", "boolean", "int", "long", "float", "double", "bytes", "string"}
PROMOTIONS = {
    "long": {"int"},
    "float": {"int", "long"},
    "double": {"int", "long", "float"},
    "bytes": {"string"},
    "string": {"bytes"},
}
ORDER = ("type", "name", "namespace", "doc", "fields", "symbols", "items", "values", "size", "default", "aliases")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAMED = {"record", "error", "enum", "fixed"}

Node = str | list[Any] | dict[str, Any]


class AvroSchema:
    def __init__(self, text: str, references: Mapping[str, str]) -> None:
        """references: texts by the full name that each defines, those first that others need. Raises InvalidSchema."""
        names = Names()
        for reference in references.values():
            _check(_read(reference), names)
        node = _read(text)
        _check(node, names)
        self.node = node
        self.text = json.dumps(_ordered(node, ""), separators=(",", ":"), ensure_ascii=False)
        self._types: dict[str, tuple[Node, str]] = {}
        for reference in references.values():
            _collect(_read(reference), "", self._types)
        _collect(node, "", self._types)
        _check_names(node)

    def check_new(self) -> None:
        """Defaults that don't fit, which others' registries let through. Raises InvalidSchema."""
        _check_defaults(self.node, "", self._types)

    def differences(self, writer: "AvroSchema") -> list[Difference]:
        return _Comparison(self._types, writer._types).of(self.node, "", writer.node, "", "")


def _read(text: str) -> Node:
    try:
        node = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if text in PRIMITIVES:  # a bare name is allowed where the schema is one
            return text
        raise InvalidSchema(f"it is no JSON: {error}") from None
    if not isinstance(node, str | list | dict):
        raise InvalidSchema("an Avro schema is a name, an object or a list")
    _check_depth(node, 0)
    return node


def _check_depth(node: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidSchema(f"types are nested more than {MAX_DEPTH} deep")
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_depth(inner, depth + 1)


def _check(node: Node, names: Names) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # logical types that it doesn't know are the schema's own matter
            avro.schema.make_avsc_object(node, names)
    except (AvroException, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidSchema(f"{type(error).__name__}: {error}") from None


def _ordered(node: Node, namespace: str) -> Node:
    """The same schema, always written the same way."""
    if isinstance(node, str):
        return node
    if isinstance(node, list):
        return [_ordered(branch, namespace) for branch in node]
    kind = node.get("type")
    if isinstance(kind, str) and kind in PRIMITIVES and set(node) == {"type"}:
        return kind
    inner = _namespace_of(node, namespace)
    found: dict[str, Any] = {}
    names = [name for name in ORDER if name in node] + sorted(set(node) - set(ORDER))
    for name in names:
        value = node[name]
        if name == "fields":
            value = [_ordered_field(field, inner) for field in value]
        elif name in ("items", "values") or (name == "type" and not isinstance(value, str)):
            value = _ordered(value, inner)
        elif name == "namespace" and value == namespace and "." not in node.get("name", ""):
            continue
        found[name] = value
    return found


def _ordered_field(field: dict[str, Any], namespace: str) -> dict[str, Any]:
    order = ("name", "type", "doc", "default", "order", "aliases")
    names = [name for name in order if name in field] + sorted(set(field) - set(order))
    return {name: _ordered(field[name], namespace) if name == "type" else field[name] for name in names}


def _namespace_of(node: Mapping[str, Any], namespace: str) -> str:
    if node.get("type") not in NAMED:
        return namespace
    before, dot, _ = node["name"].rpartition(".")
    return before if dot else str(node.get("namespace", namespace))


def _full_name(name: str, namespace: str) -> str:
    return name if "." in name or not namespace else f"{namespace}.{name}"


def _collect(node: Node, namespace: str, found: dict[str, tuple[Node, str]]) -> None:
    """Named types, each with the namespace that is in force inside it."""
    if isinstance(node, list):
        for branch in node:
            _collect(branch, namespace, found)
    elif isinstance(node, dict):
        inner = _namespace_of(node, namespace)
        if node.get("type") in NAMED:
            found[_full_name(node["name"], inner)] = (node, inner)
        for field in node.get("fields", ()) if node.get("type") in ("record", "error") else ():
            _collect(field["type"], inner, found)
        for name in ("items", "values", "type"):
            if isinstance(node.get(name), list | dict):
                _collect(node[name], inner, found)


def _check_names(node: Node) -> None:
    """The package lets names through that are none. Raises InvalidSchema."""
    for field, _ in _fields(node, ""):
        if not NAME.fullmatch(field["name"]):
            raise InvalidSchema(f"the field name {field['name']!r} is not of letters, digits and _")


def _check_defaults(node: Node, namespace: str, types: dict[str, tuple[Node, str]]) -> None:
    """Raises InvalidSchema."""
    for field, inner in _fields(node, namespace):
        if "default" in field and not _fits(field["default"], field["type"], inner, types):
            raise InvalidSchema(f"the default of the field {field['name']} doesn't fit its type")


def _fields(node: Node, namespace: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Of all records in it, each with the namespace that is in force there."""
    if isinstance(node, list):
        for branch in node:
            yield from _fields(branch, namespace)
    elif isinstance(node, dict):
        inner = _namespace_of(node, namespace)
        for field in node.get("fields", ()) if _kind(node) == "record" else ():
            yield field, inner
            yield from _fields(field["type"], inner)
        for name in ("items", "values", "type"):
            yield from _fields(node.get(name, ""), inner)


def _fits(value: Any, node: Node, namespace: str, types: dict[str, tuple[Node, str]]) -> bool:
    """A default, as JSON has it."""
    node, namespace = _resolve(node, namespace, types)
    if isinstance(node, list):
        return any(_fits(value, branch, namespace, types) for branch in node)
    kind = _kind(node)
    if isinstance(node, dict) and kind == "record":
        return isinstance(value, dict) and all(
            _fits(value[field["name"]], field["type"], namespace, types)
            if field["name"] in value
            else "default" in field
            for field in node["fields"]
        )
    if isinstance(node, dict) and kind in ("array", "map"):
        inner = node["items" if kind == "array" else "values"]
        values = value if kind == "array" else value.values() if isinstance(value, dict) else None
        return isinstance(value, list if kind == "array" else dict) and all(
            _fits(each, inner, namespace, types) for each in values or ()
        )
    if isinstance(node, dict) and kind == "enum":
        return value in node["symbols"]
    if kind in ("int", "long"):
        bits = 31 if kind == "int" else 63
        return isinstance(value, int) and not isinstance(value, bool) and -(2**bits) <= value < 2**bits
    if kind in ("float", "double"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in ("string", "bytes", "fixed"):
        return isinstance(value, str)
    return value is None if kind == "null" else isinstance(value, bool)


class _Comparison:
    def __init__(self, reader_types: dict[str, tuple[Node, str]], writer_types: dict[str, tuple[Node, str]]) -> None:
        self._reader_types = reader_types
        self._writer_types = writer_types
        self._known: dict[tuple[int, int], list[Difference]] = {}
        """Of pairs that were compared, or are being compared: a type inside itself adds nothing."""

    def of(self, reader: Node, reader_space: str, writer: Node, writer_space: str, path: str) -> list[Difference]:
        reader, reader_space = _resolve(reader, reader_space, self._reader_types)
        writer, writer_space = _resolve(writer, writer_space, self._writer_types)
        pair = (id(reader), id(writer))
        if isinstance(reader, dict) and isinstance(writer, dict):
            if pair in self._known:
                return self._known[pair]
            self._known[pair] = []
        found = self._compare(reader, reader_space, writer, writer_space, path)
        if isinstance(reader, dict) and isinstance(writer, dict):
            self._known[pair] = found
        return found

    def _compare(self, reader: Node, reader_space: str, writer: Node, writer_space: str, path: str) -> list[Difference]:
        if isinstance(writer, list):
            return self._from_union(reader, reader_space, writer, writer_space, path)
        if isinstance(reader, list):
            return self._to_union(reader, reader_space, writer, writer_space, path)
        kind, other = _kind(reader), _kind(writer)
        if kind != other:
            if other in PROMOTIONS.get(kind, ()):
                return []
            return [_type_mismatch(kind, other, path)]
        if not isinstance(reader, dict) or not isinstance(writer, dict) or kind in PRIMITIVES:
            return []
        if kind in ("array", "map"):
            name = "items" if kind == "array" else "values"
            return self.of(reader[name], reader_space, writer[name], writer_space, f"{path}/{name}")
        found = _names(reader, reader_space, writer, writer_space, path)
        if kind == "fixed":
            return found + _sizes(reader, writer, path)
        if kind == "enum":
            return found + _symbols(reader, writer, path)
        return found + self._fields(reader, reader_space, writer, writer_space, path)

    def _from_union(
        self, reader: Node, reader_space: str, writer: list[Any], writer_space: str, path: str
    ) -> list[Difference]:
        """All branches of the writer must be readable."""
        found = []
        for i, branch in enumerate(writer):
            differences = self.of(reader, reader_space, branch, writer_space, path)
            if differences and isinstance(reader, list):
                found.append(_missing_branch(branch, f"{path}/{i}"))
            else:
                found += differences
        return found

    def _to_union(
        self, reader: list[Any], reader_space: str, writer: Node, writer_space: str, path: str
    ) -> list[Difference]:
        """One branch of the reader is enough."""
        for branch in reader:
            if not self.of(branch, reader_space, writer, writer_space, path):
                return []
        return [_missing_branch(writer, path)]

    def _fields(
        self, reader: dict[str, Any], reader_space: str, writer: dict[str, Any], writer_space: str, path: str
    ) -> list[Difference]:
        written = {field["name"]: field for field in writer["fields"]}
        found = []
        for i, field in enumerate(reader["fields"]):
            names = [field["name"], *field.get("aliases", ())]
            source = next((written[name] for name in names if name in written), None)
            place = f"{path}/fields/{i}"
            if source is not None:
                found += self.of(field["type"], reader_space, source["type"], writer_space, f"{place}/type")
            elif "default" not in field:
                text = (
                    f"The field '{field['name']}' at path '{place}' in the reader's schema has no default value "
                    "and is missing in the writer's schema"
                )
                found.append(Difference("READER_FIELD_MISSING_DEFAULT_VALUE", place, text, field["name"]))
        return found


def _resolve(node: Node, namespace: str, types: dict[str, tuple[Node, str]]) -> tuple[Node, str]:
    """The type behind a name, and the namespace inside it."""
    while isinstance(node, dict) and isinstance(node.get("type"), dict | list):
        node = node["type"]
    if isinstance(node, dict) and node.get("type") in NAMED:
        return node, _namespace_of(node, namespace)
    name = node if isinstance(node, str) else node.get("type") if isinstance(node, dict) else None
    if isinstance(name, str) and name not in PRIMITIVES:
        found = types.get(_full_name(name, namespace)) or types.get(name)
        if found is not None:
            return found
    return node, namespace


def _kind(node: Node) -> str:
    kind = node if isinstance(node, str) else node["type"] if isinstance(node, dict) else "union"
    return "record" if kind == "error" else str(kind)


def _type_mismatch(reader: str, writer: str, path: str) -> Difference:
    new, old = reader.upper(), writer.upper()
    text = f"The type (path '{path or '/'}') of the reader, {new}, can't read the writer's, {old}"
    info = f"reader type: {new} not compatible with writer type: {old}"
    return Difference("TYPE_MISMATCH", path or "/", text, info)


def _missing_branch(writer: Node, path: str) -> Difference:
    kind = _kind(writer).upper()
    text = f"The reader's union at path '{path or '/'}' lacks the writer's type {kind}"
    return Difference("MISSING_UNION_BRANCH", path or "/", text, f"reader union lacking writer type: {kind}")


def _names(
    reader: dict[str, Any], reader_space: str, writer: dict[str, Any], writer_space: str, path: str
) -> list[Difference]:
    """Names without their namespaces, as the specification allows; or an alias."""
    full = _full_name(writer["name"], writer_space)
    aliases = {_full_name(alias, reader_space) for alias in reader.get("aliases", ())}
    if reader["name"].rpartition(".")[2] == writer["name"].rpartition(".")[2] or full in aliases:
        return []
    place = f"{path}/name"
    return [
        Difference("NAME_MISMATCH", place, f"The name of the type has changed (path '{place}')", f"expected: {full}")
    ]


def _sizes(reader: dict[str, Any], writer: dict[str, Any], path: str) -> list[Difference]:
    if reader["size"] == writer["size"]:
        return []
    place = f"{path}/size"
    text = f"The size of the fixed type at path '{place}' has changed"
    return [Difference("FIXED_SIZE_MISMATCH", place, text, f"expected: {writer['size']}, found: {reader['size']}")]


def _symbols(reader: dict[str, Any], writer: dict[str, Any], path: str) -> list[Difference]:
    missing = [symbol for symbol in writer["symbols"] if symbol not in reader["symbols"]]
    if not missing or "default" in reader:
        return []
    place = f"{path}/symbols"
    text = f"The reader's enum at path '{place}' lacks the writer's symbols {', '.join(missing)} and has no default"
    return [Difference("MISSING_ENUM_SYMBOLS", place, text, str(missing))]

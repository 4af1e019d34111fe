"""JSON Schema: validity by jsonschema-rs, and whether every document that fitted one schema fits another one.

Structural, and careful where it can't tell: what can't be shown to fit is a difference. As with Confluent, a property that
is added to an open object is one (old documents may have had anything there), unless its schema takes everything; objects
are open unless `additionalProperties` is false. That the branches of a `oneOf` exclude each other is believed. The drafts 4 to
2020-12 are read; `format` and annotations don't count.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urljoin

import jsonschema_rs

from headwater.schema.schema import MAX_DEPTH, Difference, InvalidSchema

Node = bool | dict[str, Any]

UPPER = {"maxLength": "MAX_LENGTH", "maximum": "MAXIMUM", "exclusiveMaximum": "EXCLUSIVE_MAXIMUM", "maxItems": "MAX_ITEMS",
         "maxProperties": "MAX_PROPERTIES"}  # fmt: skip
LOWER = {"minLength": "MIN_LENGTH", "minimum": "MINIMUM", "exclusiveMinimum": "EXCLUSIVE_MINIMUM", "minItems": "MIN_ITEMS",
         "minProperties": "MIN_PROPERTIES"}  # fmt: skip
SIZES = {"minLength", "minItems", "minProperties"}  # of 0 say nothing
SAME = {"pattern": "PATTERN", "const": "CONST", "not": "NOT_TYPE", "if": "CONDITION", "then": "CONDITION",
        "else": "CONDITION", "contains": "CONTAINS", "propertyNames": "PROPERTY_NAMES", "dependencies": "DEPENDENCY",
        "dependentRequired": "DEPENDENCY", "dependentSchemas": "DEPENDENCY", "minContains": "CONTAINS",
        "maxContains": "CONTAINS", "unevaluatedProperties": "UNEVALUATED_PROPERTIES", "unevaluatedItems": "UNEVALUATED_ITEMS",
        "$dynamicRef": "REFERENCE", "$recursiveRef": "REFERENCE"}  # fmt: skip
"""What isn't looked into: it fits when it is the same, with all that it refers to."""
DYNAMIC = ("$dynamicRef", "$recursiveRef")  # what they name depends on where one comes from: anything in the document
EVERY_TYPE = {"null", "boolean", "object", "array", "number", "string"}
SUMS = ("anyOf", "oneOf")


class JsonSchema:
    def __init__(self, text: str, references: Mapping[str, str]) -> None:
        """references: texts by the URI that the schema names them by. Raises InvalidSchema."""
        self.node = _read(text)
        self._others = {uri: _read(other) for uri, other in references.items()}
        _check(self.node, self._others)
        self._roots: dict[int, Node] = {}
        """The document that an object of it is in, by the object's id."""
        self._ids: dict[str, Node] = {}
        """Objects that have an id of their own."""
        for root in (*self._others.values(), self.node):
            for node in _nodes(root):
                self._roots[id(node)] = root
                own = node.get("$id", node.get("id"))
                if isinstance(own, str):
                    self._ids[own.removesuffix("#")] = node
        self._resolved: dict[int, Any] = {}
        self.text = json.dumps(self.node, separators=(",", ":"), ensure_ascii=False)

    def check_new(self) -> None:
        """Nothing."""

    def differences(self, writer: "JsonSchema") -> list[Difference]:
        return _Comparison(self, writer).of(self.node, writer.node, "#/")

    def resolve(self, node: Node) -> Node:
        """What a $ref stands for; the node itself where that isn't found."""
        for _ in range(MAX_DEPTH):
            if not isinstance(node, dict) or "$ref" not in node:
                return node
            if id(node) not in self._resolved:
                found = self.target(node)
                rest = {name: value for name, value in node.items() if name != "$ref"}
                if found is None:
                    found = node
                elif rest.keys() & _SAYING:
                    found = {"allOf": [found], **rest}
                self._resolved[id(node)] = found  # the same one each time: a schema inside itself is known by it
            resolved: Node = self._resolved[id(node)]
            if resolved is node:
                break
            node = resolved
        return node

    def target(self, node: Mapping[str, Any]) -> Any:
        """What its $ref names; None for nothing that is here."""
        root: Any = self._roots.get(id(node), self.node)
        uri, _, pointer = str(node["$ref"]).partition("#")
        if uri:
            base = root.get("$id", root.get("id", "")) if isinstance(root, dict) else ""
            named = (uri, str(node["$ref"]), urljoin(str(base), uri))
            roots = [known[name] for name in named for known in (self._others, self._ids) if name in known]
            root = roots[0] if roots else None
        return _at(root, unquote(pointer)) if root is not None else None

    def closure(self, node: Any) -> str:
        """A text that is the same only when the node is, with all that it refers to."""
        found: dict[int, str] = {}
        todo = [node]
        while todo:
            each = todo.pop()
            if id(each) in found:
                continue
            found[id(each)] = json.dumps(each, sort_keys=True)
            for inner in _nodes(each):
                if "$ref" in inner:
                    todo.append(self.target(inner))
                if any(name in inner for name in DYNAMIC):
                    todo.append(self._roots.get(id(inner), self.node))
        return "\n".join(found.values())


_KEYWORDS = {"type", "enum", "properties", "required", "items", *UPPER, *LOWER, *SAME, *SUMS}


def _read(text: str) -> Node:
    try:
        node = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidSchema(f"it is no JSON: {error}") from None
    if not isinstance(node, bool | dict):
        raise InvalidSchema("a JSON schema is an object, true or false")
    _check_depth(node, 0)
    return node


def _check_depth(node: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidSchema(f"it is nested more than {MAX_DEPTH} deep")
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_depth(inner, depth + 1)


def _check(node: Node, others: Mapping[str, Node]) -> None:
    """Nothing is ever fetched: what isn't among the references isn't there."""

    def retrieve(uri: str) -> Any:
        for name, other in others.items():
            if uri in (name, f"json-schema:///{name}") or uri.endswith(f"/{name}"):
                return other
        raise ValueError(f"{uri} is none of its references")

    try:
        jsonschema_rs.validator_for(node, retriever=retrieve)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
        raise InvalidSchema(str(error).split("\n")[0]) from None


def _at(root: Any, pointer: str) -> Any:
    """What a JSON pointer, or a plain anchor, names; None for nothing."""
    if pointer in ("", "/"):
        return root
    if not pointer.startswith("/"):
        return next((node for node in _nodes(root) if node.get("$anchor") == pointer), None)
    for part in pointer[1:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(root, dict):
            root = root.get(name)
        elif isinstance(root, list) and name.isdecimal() and int(name) < len(root):
            root = root[int(name)]
        else:
            return None
    return root


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(inner)


class _Comparison:
    def __init__(self, reader: JsonSchema, writer: JsonSchema) -> None:
        self._reader = reader
        self._writer = writer
        self._under_way: set[tuple[int, int]] = set()
        self._made: dict[tuple[int, int], Node] = {}
        """On the way, by what they were made of: the same one each time, and an id that is in use is not given again."""

    def of(self, reader: Node, writer: Node, path: str) -> list[Difference]:
        reader, writer = self._reader.resolve(reader), self._writer.resolve(writer)
        if _takes_all(reader) or writer is False:
            return []
        pair = (id(reader), id(writer))
        if pair in self._under_way:
            return []  # a schema inside itself adds nothing
        self._under_way.add(pair)
        try:
            return self._compare(reader, {} if writer is True else writer, path)
        finally:
            self._under_way.discard(pair)

    def _compare(self, reader: Node, writer: Node, path: str) -> list[Difference]:
        assert isinstance(writer, dict)
        if reader is False:
            return [_difference("TYPE_NARROWED", path, "nothing is allowed any more")]
        assert isinstance(reader, dict)
        if "$ref" in reader:
            return [_difference("REFERENCE_UNKNOWN", path, f"what {reader['$ref']} names isn't here")]
        if "allOf" in writer:
            return self.of(reader, self._make(writer, writer, lambda: self._merged(writer)), path)
        changed = [name for name in SUMS if not self._fit_in_pairs(reader.get(name), writer.get(name), path)]
        for name in changed:
            if name in writer:
                return self._from_sum(reader, writer, name, path)
        found: list[Difference] = []
        for i, part in enumerate(reader.get("allOf", ())):
            found += self.of(part, writer, f"{path}allOf/{i}/")
        for name in changed:
            if name in reader:
                found += self._to_sum(reader[name], writer, name, path)
        return found + self._plain(reader, writer, path)

    def _fit_in_pairs(self, reader: list[Node] | None, writer: list[Node] | None, path: str) -> bool:
        """The same branches, and each still takes what it took: what they refer to may have changed."""
        return reader == writer and not any(
            self.of(new, old, path) for new, old in zip(reader or (), writer or (), strict=True)
        )

    def _make(self, of: Node, inside: Node, make: Callable[[], Node]) -> Node:
        key = (id(of), id(inside))
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _merged(self, writer: dict[str, Any]) -> dict[str, Any]:
        """One schema for what fits all of them. Where two speak of the same, the stricter word isn't looked for: the first
        one counts, which can only make it look wider than it is."""
        merged = {name: value for name, value in writer.items() if name != "allOf"}
        for part in writer["allOf"]:
            node = self._writer.resolve(part)
            if isinstance(node, dict) and "allOf" in node:
                node = self._merged(node)
            for name, value in node.items() if isinstance(node, dict) else ():
                if name == "required":
                    merged[name] = sorted({*merged.get(name, ()), *value})
                elif name == "properties":
                    merged[name] = {**value, **merged.get(name, {})}
                elif name == "type" and name in merged:
                    merged[name] = sorted(_types(merged) & _types({"type": value})) or merged[name]
                elif name == "additionalProperties" and value is False:
                    merged[name] = False
                else:
                    merged.setdefault(name, value)
        return merged

    def _from_sum(self, reader: Node, writer: dict[str, Any], name: str, path: str) -> list[Difference]:
        """Each branch that a document may have followed must be readable."""
        rest = {key: value for key, value in writer.items() if key != name}
        found = []
        for i, branch in enumerate(writer[name]):
            whole = branch
            if rest.keys() & _SAYING:
                whole = self._make(branch, writer, lambda branch=branch: {"allOf": [branch], **rest})  # type: ignore[misc]
            if self.of(reader, whole, path):
                text = f"the branch {i} of {name} can't be read any more"
                found.append(_difference("SUM_TYPE_NARROWED", f"{path}{name}/{i}", text))
        return found

    def _to_sum(self, branches: list[Node], writer: Node, name: str, path: str) -> list[Difference]:
        if any(not self.of(branch, writer, f"{path}{name}/{i}/") for i, branch in enumerate(branches)):
            return []
        return [_difference("COMBINED_TYPE_SUBSCHEMAS_CHANGED", f"{path}{name}", f"no branch of {name} takes it")]

    def _plain(self, reader: dict[str, Any], writer: dict[str, Any], path: str) -> list[Difference]:
        types, others = _types(reader), _types(writer)
        narrowed = {kind for kind in others if kind not in types and not (kind == "integer" and "number" in types)}
        if narrowed:
            kind = "TYPE_CHANGED" if narrowed == others else "TYPE_NARROWED"
            return [_difference(kind, path, f"{' and '.join(sorted(narrowed))} may have been written")]
        found = _values(reader, writer, path) + self._same(reader, writer, path)
        if "object" in others:
            found += self._object(reader, writer, path)
        if "array" in others:
            found += self._array(reader, writer, path)
        return found

    def _same(self, reader: dict[str, Any], writer: dict[str, Any], path: str) -> list[Difference]:
        found = []
        for name, kind in SAME.items():
            if name not in reader or reader[name] is True:
                continue
            if name not in writer:
                found.append(_difference(f"{kind}_ADDED", f"{path}{name}", f"{name} is new"))
            elif self._reader.closure(_only(reader, name)) != self._writer.closure(_only(writer, name)):
                found.append(_difference(f"{kind}_CHANGED", f"{path}{name}", f"{name} has changed"))
        return found

    def _object(self, reader: dict[str, Any], writer: dict[str, Any], path: str) -> list[Difference]:
        found: list[Difference] = []
        new, old = reader.get("properties", {}), writer.get("properties", {})
        for name, schema in old.items():
            place = f"{path}properties/{name}"
            if name in new:
                found += self.of(new[name], schema, f"{place}/")
                continue
            rest = _for_others(reader, name)
            if schema is False or _takes_all(rest):
                continue
            if rest is False:
                text = f"the property {name} may have been written, and the object takes no others"
                found.append(_difference("PROPERTY_REMOVED_FROM_CLOSED_CONTENT_MODEL", place, text))
            elif self.of(rest, schema, f"{place}/"):
                text = f"the property {name} doesn't fit what other properties must be"
                found.append(_difference("PROPERTY_REMOVED_NOT_COVERED_BY_PARTIALLY_OPEN_CONTENT_MODEL", place, text))
        for name, schema in new.items():
            if name not in old:
                found += self._added(name, schema, writer, f"{path}properties/{name}")
        old_rest, new_rest = writer.get("additionalProperties", True), reader.get("additionalProperties", True)
        if self.of(new_rest, old_rest, f"{path}additionalProperties/"):
            kind = "ADDITIONAL_PROPERTIES_REMOVED" if new_rest is False else "ADDITIONAL_PROPERTIES_NARROWED"
            found.append(_difference(kind, f"{path}additionalProperties", "other properties may have been written"))
        for pattern, schema in reader.get("patternProperties", {}).items():
            before = writer.get("patternProperties", {})
            found += self.of(schema, before.get(pattern, old_rest), f"{path}patternProperties/{pattern}/")
            for name in old.keys() & new.keys() if pattern not in before else ():
                if _matches(pattern, name):
                    found += self.of(schema, old[name], f"{path}patternProperties/{pattern}/")
        for name in reader.get("required", ()):
            has_default = isinstance(new.get(name), dict) and "default" in new[name]
            if name not in writer.get("required", ()) and not has_default:
                text = f"the property {name} is required now, and may not have been written"
                found.append(_difference("REQUIRED_ATTRIBUTE_ADDED", f"{path}required/{name}", text))
        return found

    def _added(self, name: str, schema: Node, writer: dict[str, Any], place: str) -> list[Difference]:
        rest = _for_others(writer, name)
        if not self.of(schema, rest, f"{place}/"):
            return []
        if _takes_all(rest):
            text = f"the property {name} may have been written with any value, as the object was open"
            return [_difference("PROPERTY_ADDED_TO_OPEN_CONTENT_MODEL", place, text)]
        text = f"the property {name} doesn't take what other properties could be"
        return [_difference("PROPERTY_ADDED_NOT_COVERED_BY_PARTIALLY_OPEN_CONTENT_MODEL", place, text)]

    def _array(self, reader: dict[str, Any], writer: dict[str, Any], path: str) -> list[Difference]:
        new, new_rest = _items(reader)
        old, old_rest = _items(writer)
        found: list[Difference] = []
        for i in range(max(len(new), len(old))):
            found += self.of(
                new[i] if i < len(new) else new_rest, old[i] if i < len(old) else old_rest, f"{path}items/{i}/"
            )
        found += self.of(new_rest, old_rest, f"{path}items/")
        if reader.get("uniqueItems") and not writer.get("uniqueItems"):
            found.append(_difference("UNIQUE_ITEMS_ADDED", f"{path}uniqueItems", "items may have been written twice"))
        return found


def _difference(kind: str, path: str, text: str) -> Difference:
    path = path.rstrip("/") if len(path) > 2 else path
    return Difference(kind, path, f"{text} (path '{path}')", path.rpartition("/")[2])


def _takes_all(node: Node) -> bool:
    return node is True or (isinstance(node, dict) and not node.keys() & _SAYING)


_RESTRICTIONS = {"$ref", "allOf", "additionalProperties", "patternProperties", "multipleOf", "uniqueItems", "prefixItems",
                 "additionalItems"}  # fmt: skip
_SAYING = _KEYWORDS | _RESTRICTIONS
"""Names of what a document must fit; the others are notes."""


def _only(node: dict[str, Any], name: str) -> Any:
    """The keyword's value; of a reference the whole node, as it is the node that names something."""
    return node if name in DYNAMIC else node[name]


def _types(node: Mapping[str, Any]) -> set[str]:
    kind = node.get("type")
    if kind is None:
        values = node["enum"] if "enum" in node else [node["const"]] if "const" in node else None
        return {_type_of(value) for value in values} if values is not None else set(EVERY_TYPE)
    return {kind} if isinstance(kind, str) else set(kind)


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]


def _for_others(node: Mapping[str, Any], name: str) -> Node:
    """What a property must be that is not declared by name."""
    for pattern, schema in node.get("patternProperties", {}).items():
        if _matches(pattern, name):
            return schema  # type: ignore[no-any-return]
    return node.get("additionalProperties", True)  # type: ignore[no-any-return]


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:  # another dialect's
        return False


def _items(node: Mapping[str, Any]) -> tuple[list[Node], Node]:
    """Those with a place of their own, and what all others must be: of either dialect."""
    items = node.get("items", True)
    if "prefixItems" in node:
        return node["prefixItems"], items
    if isinstance(items, list):
        return items, node.get("additionalItems", True)
    return [], items


def _values(reader: Mapping[str, Any], writer: Mapping[str, Any], path: str) -> list[Difference]:
    """Keywords about single values."""
    found = []
    for bounds, is_upper in ((UPPER, True), (LOWER, False)):
        for name, kind in bounds.items():
            new, old = reader.get(name), writer.get(name)
            if new is True and old is not True:  # draft 4: the limit itself is out
                found.append(_difference(f"{kind}_ADDED", f"{path}{name}", f"{name} is new"))
            if new is None or isinstance(new, bool) or (new == 0 and name in SIZES):
                continue
            old = None if isinstance(old, bool) else old
            if old is None:
                found.append(_difference(f"{kind}_ADDED", f"{path}{name}", f"{name} is {new} and was not limited"))
            elif (new < old) if is_upper else (new > old):
                verb = "DECREASED" if is_upper else "INCREASED"
                found.append(_difference(f"{kind}_{verb}", f"{path}{name}", f"{name} is {new} and was {old}"))
    multiple, before = reader.get("multipleOf"), writer.get("multipleOf")
    if multiple is not None and (before is None or before % multiple != 0):
        text = f"multipleOf is {multiple} and was {before if before is not None else 'not there'}"
        found.append(_difference("MULTIPLE_OF_CHANGED", f"{path}multipleOf", text))
    if "enum" in reader:
        allowed = reader["enum"]
        written = writer.get("enum", [writer["const"]] if "const" in writer else None)
        if written is None:
            found.append(_difference("ENUM_ARRAY_ADDED", f"{path}enum", "other values may have been written"))
        elif any(value not in allowed for value in written):
            gone = ", ".join(json.dumps(value) for value in written if value not in allowed)
            found.append(_difference("ENUM_ARRAY_NARROWED", f"{path}enum", f"{gone} may have been written"))
    return found

"""A .proto file from its descriptor: always written the same way, with its leading comments."""

import json
from collections.abc import Iterable, Sequence

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from google.protobuf.message import Message

F = FieldDescriptorProto
LABELS = {F.LABEL_OPTIONAL: "optional ", F.LABEL_REQUIRED: "required ", F.LABEL_REPEATED: "repeated "}
MAX_FIELD = 536870911


class _Printer:
    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._lines: list[str] = []
        self._comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        self._is_proto3 = file.syntax == "proto3"
        self._has_editions = file.syntax == "editions"

    def text(self) -> str:
        file = self._file
        if self._has_editions:
            from google.protobuf.descriptor_pb2 import Edition

            self._line(0, f'edition = "{Edition.Name(file.edition).removeprefix("EDITION_")}";')
        else:
            self._line(0, f'syntax = "{file.syntax or "proto2"}";')
        if file.package:
            self._line(0, f"package {file.package};")
        self._gap(bool(file.dependency))
        for i, name in enumerate(file.dependency):
            kind = "public " if i in file.public_dependency else "weak " if i in file.weak_dependency else ""
            self._line(0, f'import {kind}"{name}";')
        options = list(_options(file.options))
        self._gap(bool(options))
        for option in options:
            self._line(0, f"option {option};")
        for i, message in enumerate(file.message_type):
            self._gap()
            self._message(message, 0, (4, i), f".{file.package}" if file.package else "")
        for i, enum in enumerate(file.enum_type):
            self._gap()
            self._enum(enum, 0, (5, i))
        for i, service in enumerate(file.service):
            self._gap()
            self._service(service, (6, i))
        for i, extension in enumerate(file.extension):
            self._gap()
            self._extend(extension, 0, (7, i))
        return "\n".join(self._lines) + "\n"

    def _line(self, depth: int, text: str) -> None:
        self._lines.append("  " * depth + text)

    def _gap(self, wanted: bool = True) -> None:
        if wanted:
            self._lines.append("")

    def _comment(self, depth: int, path: tuple[int, ...]) -> None:
        for line in self._comments.get(path, "").rstrip("\n").split("\n") if self._comments.get(path) else ():
            self._line(depth, f"//{line}".rstrip())

    def _message(self, message: DescriptorProto, depth: int, path: tuple[int, ...], scope: str) -> None:
        self._comment(depth, path)
        self._line(depth, f"message {message.name} {{")
        scope = f"{scope}.{message.name}"
        for option in _options(message.options, leave_out=("map_entry",)):
            self._line(depth + 1, f"option {option};")
        self._reserved(message.reserved_range, message.reserved_name, depth + 1, 1)
        for span in message.extension_range:
            self._line(depth + 1, f"extensions {_span(span.start, span.end - 1)};")
        maps = {f"{scope}.{inner.name}": inner for inner in message.nested_type if inner.options.map_entry}
        printed: set[int] = set()
        for i, field in enumerate(message.field):
            if field.HasField("oneof_index") and not field.proto3_optional:
                if field.oneof_index not in printed:
                    printed.add(field.oneof_index)
                    self._oneof(message, field.oneof_index, depth + 1, path)
            else:
                self._comment(depth + 1, (*path, 2, i))
                self._line(depth + 1, self._field(field, maps.get(field.type_name)))
        for i, inner in enumerate(message.nested_type):
            if not inner.options.map_entry:
                self._gap()
                self._message(inner, depth + 1, (*path, 3, i), scope)
        for i, enum in enumerate(message.enum_type):
            self._gap()
            self._enum(enum, depth + 1, (*path, 4, i))
        for i, extension in enumerate(message.extension):
            self._extend(extension, depth + 1, (*path, 6, i))
        self._line(depth, "}")

    def _oneof(self, message: DescriptorProto, index: int, depth: int, path: tuple[int, ...]) -> None:
        self._comment(depth, (*path, 8, index))
        self._line(depth, f"oneof {message.oneof_decl[index].name} {{")
        for i, field in enumerate(message.field):
            if field.HasField("oneof_index") and field.oneof_index == index and not field.proto3_optional:
                self._comment(depth + 1, (*path, 2, i))
                self._line(depth + 1, self._field(field, None, is_in_oneof=True))
        self._line(depth, "}")

    def _field(self, field: FieldDescriptorProto, entry: DescriptorProto | None, *, is_in_oneof: bool = False) -> str:
        if entry is not None:
            label, kind = "", f"map<{_type(entry.field[0])}, {_type(entry.field[1])}>"
        else:
            label, kind = self._label(field, is_in_oneof), _type(field)
        options = list(_options(field.options))
        if field.HasField("default_value"):
            is_text = field.type in (F.TYPE_STRING, F.TYPE_BYTES)
            options.insert(0, f"default = {json.dumps(field.default_value) if is_text else field.default_value}")
        if field.HasField("json_name") and field.json_name != _camel(field.name):
            options.append(f'json_name = "{field.json_name}"')
        end = f" [{', '.join(options)}]" if options else ""
        return f"{label}{kind} {field.name} = {field.number}{end};"

    def _label(self, field: FieldDescriptorProto, is_in_oneof: bool) -> str:
        if is_in_oneof:
            return ""
        if field.label == F.LABEL_OPTIONAL and ((self._is_proto3 and not field.proto3_optional) or self._has_editions):
            return ""
        return LABELS[field.label]

    def _reserved(self, ranges: Iterable[object], names: Sequence[str], depth: int, beyond: int) -> None:
        spans = [_span(span.start, span.end - beyond) for span in ranges]  # type: ignore[attr-defined]
        if spans:
            self._line(depth, f"reserved {', '.join(spans)};")
        if names:
            quoted = [name if self._has_editions else f'"{name}"' for name in names]
            self._line(depth, f"reserved {', '.join(quoted)};")

    def _enum(self, enum: EnumDescriptorProto, depth: int, path: tuple[int, ...]) -> None:
        self._comment(depth, path)
        self._line(depth, f"enum {enum.name} {{")
        for option in _options(enum.options):
            self._line(depth + 1, f"option {option};")
        self._reserved(enum.reserved_range, enum.reserved_name, depth + 1, 0)
        for i, value in enumerate(enum.value):
            self._comment(depth + 1, (*path, 2, i))
            options = list(_options(value.options))
            end = f" [{', '.join(options)}]" if options else ""
            self._line(depth + 1, f"{value.name} = {value.number}{end};")
        self._line(depth, "}")

    def _service(self, service: ServiceDescriptorProto, path: tuple[int, ...]) -> None:
        self._comment(0, path)
        self._line(0, f"service {service.name} {{")
        for option in _options(service.options):
            self._line(1, f"option {option};")
        for i, method in enumerate(service.method):
            self._comment(1, (*path, 2, i))
            self._line(1, _method(method))
        self._line(0, "}")

    def _extend(self, extension: FieldDescriptorProto, depth: int, path: tuple[int, ...]) -> None:
        self._comment(depth, path)
        self._line(depth, f"extend {extension.extendee} {{")
        self._line(depth + 1, self._field(extension, None))
        self._line(depth, "}")


def _method(method: MethodDescriptorProto) -> str:
    sends = f"{'stream ' if method.client_streaming else ''}{method.input_type}"
    gives = f"{'stream ' if method.server_streaming else ''}{method.output_type}"
    options = list(_options(method.options))
    body = f" {{ {' '.join(f'option {option};' for option in options)} }}" if options else ";"
    return f"rpc {method.name} ({sends}) returns ({gives}){body}"


def _span(start: int, end: int) -> str:
    if start == end:
        return str(start)
    return f"{start} to {'max' if end >= MAX_FIELD else end}"


def _type(field: FieldDescriptorProto) -> str:
    return str(field.type_name or F.Type.Name(field.type).removeprefix("TYPE_").lower())


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in rest)


def _options(options: Message, leave_out: Sequence[str] = ()) -> Iterable[str]:
    """Those that the language itself has. Custom ones need their extension's own code: they are left out."""
    for descriptor, value in options.ListFields():
        if descriptor.is_extension or descriptor.name in (*leave_out, "uninterpreted_option"):
            continue
        if descriptor.enum_type is not None:
            numbers = descriptor.enum_type.values_by_number
            for number in value if isinstance(value, Sequence) else [value]:
                yield f"{descriptor.name} = {numbers[number].name}"
        elif isinstance(value, bool):
            yield f"{descriptor.name} = {str(value).lower()}"
        elif isinstance(value, str):
            yield f"{descriptor.name} = {json.dumps(value)}"
        elif isinstance(value, int | float):
            yield f"{descriptor.name} = {value}"


def print_file(file: FileDescriptorProto) -> str:
    return _Printer(file).text()

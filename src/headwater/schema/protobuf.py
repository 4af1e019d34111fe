"""Protocol Buffers: parsing by protoc, and the rules by which one schema reads what another one wrote.

The rules are the encoding's: a field is its number. Numbers may come and go; the type behind one may change only within
its group on the wire (int32, uint32, int64, uint64, bool and enums; sint32 and sint64; string and bytes; the fixed ones by
size). Names count for nothing but messages, which are asked for by name. The kinds of differences are Confluent's.

Clients register either the text of a .proto file or a serialized FileDescriptorProto in base64; what is kept is text,
always printed the same way.
"""

import base64
import binascii
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.message import DecodeError
from grpc_tools import _protoc_compiler

from headwater.schema.proto_text import print_file
from headwater.schema.schema import Difference, InvalidSchema

MAIN = "schema.proto"
GOOGLE = Path(_protoc_compiler.__file__).parent / "_proto"

F = FieldDescriptorProto
GROUPS = {
    **dict.fromkeys((F.TYPE_INT32, F.TYPE_UINT32, F.TYPE_INT64, F.TYPE_UINT64, F.TYPE_BOOL, F.TYPE_ENUM), "varint"),
    **dict.fromkeys((F.TYPE_SINT32, F.TYPE_SINT64), "zigzag"),
    **dict.fromkeys((F.TYPE_STRING, F.TYPE_BYTES), "text or bytes"),
    **dict.fromkeys((F.TYPE_FIXED32, F.TYPE_SFIXED32), "four bytes"),
    **dict.fromkeys((F.TYPE_FIXED64, F.TYPE_SFIXED64), "eight bytes"),
    F.TYPE_FLOAT: "float",
    F.TYPE_DOUBLE: "double",
    F.TYPE_MESSAGE: "message",
    F.TYPE_GROUP: "group",
}

_compiler = threading.Lock()  # protoc keeps global state while it runs


class ProtobufSchema:
    def __init__(self, text: str, references: Mapping[str, str]) -> None:
        """references: texts by the path that the schema imports them by. Raises InvalidSchema."""
        self.file, self.files = _parse(text, references)
        self.text = print_file(self.file)

    def serialized(self) -> str:
        """As protoc has it, in base64: `?format=serialized`."""
        file = FileDescriptorProto()
        file.CopyFrom(self.file)
        file.ClearField("source_code_info")
        return str(base64.b64encode(file.SerializeToString(deterministic=True)), "ascii")

    def check_new(self) -> None:
        """Nothing."""

    def differences(self, writer: "ProtobufSchema") -> list[Difference]:
        return _Comparison(_messages(self.files), _messages(writer.files)).of_files(self.file, writer.file)


def _parse(text: str, references: Mapping[str, str]) -> tuple[FileDescriptorProto, list[FileDescriptorProto]]:
    """The file, and all that it imports."""
    serialized = _from_base64(text)
    if serialized is not None:
        text = print_file(serialized)
    with tempfile.TemporaryDirectory(prefix="headwater-proto-") as folder:
        for name, content in {MAIN: text, **references}.items():
            path = (Path(folder) / name).resolve()
            if not path.is_relative_to(Path(folder).resolve()) or "\0" in name:
                raise InvalidSchema(f"{name!r} is no name for an import")
            path.parent.mkdir(parents=True, exist_ok=True)
            other = _from_base64(content)
            path.write_text(print_file(other) if other is not None else content)
        return _compile(folder, references)


def _compile(folder: str, references: Mapping[str, str]) -> tuple[FileDescriptorProto, list[FileDescriptorProto]]:
    includes = [folder.encode(), str(GOOGLE).encode()]
    out = os.path.join(folder, "descriptors")
    with _compiler:
        try:
            _protoc_compiler.get_protos(MAIN.encode(), includes)
        except _protoc_compiler.ProtocErrors as errors:
            raise InvalidSchema("; ".join(_said(error) for error in errors.args[0][:3])) from None
        arguments = ["protoc", f"-I{folder}", f"-I{GOOGLE}", "--include_imports", "--include_source_info",
                     f"--descriptor_set_out={out}", MAIN]  # fmt: skip
        if _protoc_compiler.run_main([argument.encode() for argument in arguments]) != 0:
            raise InvalidSchema("protoc can't read it")
    files = list(FileDescriptorSet.FromString(Path(out).read_bytes()).file)
    return files[-1], files


def _said(error: object) -> str:
    message = getattr(error, "message", error)
    text = message.decode() if isinstance(message, bytes) else str(message)
    text = text.removeprefix("b'").removesuffix("'")
    line = getattr(error, "line", -1)
    return f"line {line + 1}: {text}" if line >= 0 else text


def _from_base64(text: str) -> FileDescriptorProto | None:
    """None for what is text already."""
    try:
        data = base64.b64decode(text, validate=True)
        file = FileDescriptorProto.FromString(data)
    except (binascii.Error, DecodeError, ValueError):
        return None
    return file if data and (file.message_type or file.enum_type or file.syntax or file.name) else None


def _messages(files: list[FileDescriptorProto]) -> dict[str, DescriptorProto | EnumDescriptorProto]:
    """By full name, with the leading dot that fields have."""
    found: dict[str, DescriptorProto | EnumDescriptorProto] = {}
    for file in files:
        prefix = f".{file.package}" if file.package else ""
        for message in file.message_type:
            found.update(_named(message, prefix))
        for enum in file.enum_type:
            found[f"{prefix}.{enum.name}"] = enum
    return found


def _named(message: DescriptorProto, prefix: str) -> Iterator[tuple[str, DescriptorProto | EnumDescriptorProto]]:
    name = f"{prefix}.{message.name}"
    yield name, message
    for inner in message.nested_type:
        yield from _named(inner, name)
    for enum in message.enum_type:
        yield f"{name}.{enum.name}", enum


class _Comparison:
    def __init__(
        self,
        reader_types: Mapping[str, DescriptorProto | EnumDescriptorProto],
        writer_types: Mapping[str, DescriptorProto | EnumDescriptorProto],
    ) -> None:
        self._reader_types = reader_types
        self._writer_types = writer_types
        self._seen: set[tuple[str, str]] = set()

    def of_files(self, reader: FileDescriptorProto, writer: FileDescriptorProto) -> list[Difference]:
        found: list[Difference] = []
        new = {message.name: message for message in reader.message_type}
        for message in writer.message_type:
            place = f"#/{message.name}"
            if message.name not in new:
                found.append(Difference("MESSAGE_REMOVED", place, f"The message {message.name} is gone", message.name))
            else:
                found += self._messages(new[message.name], message, place)
        return found

    def _messages(self, reader: DescriptorProto, writer: DescriptorProto, path: str) -> list[Difference]:
        new = {field.number: field for field in reader.field}
        old = {field.number: field for field in writer.field}
        found: list[Difference] = []
        for number, field in old.items():
            place = f"{path}/{number}"
            other = new.get(number)
            if other is not None:
                found += self._fields(other, field, place)
            elif field.label == F.LABEL_REQUIRED:
                found.append(_difference("REQUIRED_FIELD_REMOVED", place, field, "was required and is gone"))
            elif field.HasField("oneof_index") and not field.proto3_optional and self._has_oneof(reader, writer, field):
                found.append(_difference("ONEOF_FIELD_REMOVED", place, field, "was taken out of its oneof"))
        for number, field in new.items():
            if number not in old and field.label == F.LABEL_REQUIRED:
                found.append(_difference("REQUIRED_FIELD_ADDED", f"{path}/{number}", field, "is required and new"))
        found += _moved(reader, writer, path)
        names = {message.name: message for message in reader.nested_type if not message.options.map_entry}
        for message in writer.nested_type:
            place = f"{path}/{message.name}"
            if message.options.map_entry:
                continue
            if message.name not in names:
                found.append(Difference("MESSAGE_REMOVED", place, f"The message {message.name} is gone", message.name))
            else:
                found += self._messages(names[message.name], message, place)
        return found

    def _has_oneof(self, reader: DescriptorProto, writer: DescriptorProto, field: FieldDescriptorProto) -> bool:
        name = writer.oneof_decl[field.oneof_index].name
        return any(oneof.name == name for oneof in reader.oneof_decl)

    def _fields(self, reader: FieldDescriptorProto, writer: FieldDescriptorProto, path: str) -> list[Difference]:
        if GROUPS[reader.type] != GROUPS[writer.type]:
            is_scalar = not reader.type_name and not writer.type_name
            kind = "FIELD_SCALAR_KIND_CHANGED" if is_scalar else "FIELD_KIND_CHANGED"
            return [_difference(kind, path, reader, f"was {_type(writer)} and is {_type(reader)}")]
        found: list[Difference] = []
        is_repeated = reader.label == F.LABEL_REPEATED
        if is_repeated != (writer.label == F.LABEL_REPEATED) and GROUPS[reader.type] not in (
            "text or bytes",
            "message",
        ):
            text = "is repeated now" if is_repeated else "is no longer repeated"
            found.append(_difference("FIELD_NUMERIC_LABEL_CHANGED", path, reader, text))
        elif writer.label == F.LABEL_OPTIONAL and reader.label == F.LABEL_REQUIRED:
            found.append(_difference("REQUIRED_FIELD_ADDED", path, reader, "has become required"))
        if reader.type == F.TYPE_MESSAGE:
            found += self._types(reader, writer, path)
        return found

    def _types(self, reader: FieldDescriptorProto, writer: FieldDescriptorProto, path: str) -> list[Difference]:
        new, old = self._reader_types[reader.type_name], self._writer_types[writer.type_name]
        if not isinstance(new, DescriptorProto) or not isinstance(old, DescriptorProto):
            return []
        if new.options.map_entry and old.options.map_entry:
            return self._messages(new, old, path)
        if reader.type_name.rpartition(".")[2] != writer.type_name.rpartition(".")[2]:
            text = f"was {writer.type_name[1:]} and is {reader.type_name[1:]}"
            return [_difference("FIELD_NAMED_TYPE_CHANGED", path, reader, text)]
        pair = (reader.type_name, writer.type_name)
        if pair in self._seen:
            return []
        self._seen.add(pair)
        return self._messages(new, old, path)


def _moved(reader: DescriptorProto, writer: DescriptorProto, path: str) -> list[Difference]:
    """Fields that could be set together and no longer can."""
    old = {field.number: field for field in writer.field}
    found = []
    for i, oneof in enumerate(reader.oneof_decl):
        members = [
            f for f in reader.field if f.HasField("oneof_index") and f.oneof_index == i and not f.proto3_optional
        ]
        free = [
            field
            for field in members
            if field.number in old
            and not (old[field.number].HasField("oneof_index") and not old[field.number].proto3_optional)
        ]
        existed = any(other.name == oneof.name for other in writer.oneof_decl)
        if len(free) > 1 or (free and existed):
            kind = "FIELD_MOVED_TO_EXISTING_ONEOF" if existed else "MULTIPLE_FIELDS_MOVED_TO_ONEOF"
            names = ", ".join(field.name for field in free)
            place = f"{path}/{oneof.name}"
            found.append(Difference(kind, place, f"The fields {names} moved into the oneof {oneof.name}", names))
    return found


def _type(field: FieldDescriptorProto) -> str:
    return str(field.type_name[1:] or F.Type.Name(field.type).removeprefix("TYPE_").lower())


def _difference(kind: str, path: str, field: FieldDescriptorProto, text: str) -> Difference:
    return Difference(kind, path, f"The field '{field.name}' at path '{path}' {text}", field.name)

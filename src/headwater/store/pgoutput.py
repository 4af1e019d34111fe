"""PostgreSQL's logical decoding output, as far as inserts need it (the plugin pgoutput, protocol version 1, values as text).

Source: PostgreSQL's documentation, "Logical Replication Message Formats". What is none of these is passed over.
"""

import struct
from typing import NamedTuple

BOOL = 16
BYTEA = 17


class Begin(NamedTuple):
    commit_lsn: int
    """Where the transaction's commit is in the log."""
    xid: int
    """The low 32 bits of the transaction's id."""


class Commit(NamedTuple):
    end_lsn: int
    """Behind the transaction in the log: what is confirmed when all of it is dealt with."""


class Relation(NamedTuple):
    id: int
    columns: list[tuple[str, int]]
    """Names, and the types' object ids."""


class Insert(NamedTuple):
    relation: int
    values: list[bytes | None]
    """As text, in the order of the relation's columns."""


Change = Begin | Commit | Relation | Insert


class Malformed(ValueError):
    """The bytes are no message of this protocol."""


def decode(message: bytes) -> Change | None:
    """None for a message that says nothing about inserts. Raises Malformed."""
    try:
        kind = message[:1]
        if kind == b"B":
            commit_lsn, _, xid = struct.unpack_from(">QqI", message, 1)
            return Begin(commit_lsn, xid)
        if kind == b"C":
            return Commit(struct.unpack_from(">BQQ", message, 1)[2])
        if kind == b"R":
            return _relation(message)
        if kind == b"I":
            return _insert(message)
    except (struct.error, ValueError, IndexError) as error:
        raise Malformed(f"{message[:20]!r}: {error}") from None
    return None


def _relation(message: bytes) -> Relation:
    (id,) = struct.unpack_from(">I", message, 1)
    at = message.index(b"\0", 5) + 1
    at = message.index(b"\0", at) + 1
    _, count = struct.unpack_from(">bH", message, at)
    at += 3
    columns = []
    for _ in range(count):
        end = message.index(b"\0", at + 1)
        (oid,) = struct.unpack_from(">I", message, end + 1)
        columns.append((message[at + 1 : end].decode(), oid))
        at = end + 9
    return Relation(id, columns)


def _insert(message: bytes) -> Insert:
    relation, _, count = struct.unpack_from(">IcH", message, 1)
    at = 8
    values: list[bytes | None] = []
    for _ in range(count):
        kind = message[at : at + 1]
        at += 1
        if kind == b"t":
            (size,) = struct.unpack_from(">I", message, at)
            at += 4
            if at + size > len(message):
                raise Malformed("a value is cut off")
            values.append(message[at : at + size])
            at += size
        elif kind == b"n":
            values.append(None)
        else:
            raise Malformed(f"a value of kind {kind!r}")
    return Insert(relation, values)


def value_of(text: bytes | None, oid: int) -> object:
    """bytea (as bytea_output=hex has it) as bytes, everything else as text, as a cast to text has it."""
    if text is None:
        return None
    if oid == BOOL:
        return "true" if text == b"t" else "false"
    return bytes.fromhex(text[2:].decode()) if oid == BYTEA else text.decode()

"""What the coordinator keeps in `__consumer_offsets`: Kafka's own records.

    key   = version i16, fields       1: a committed offset, 2: a group
    value = version i16, fields       no value: forget it

Offsets are written as version 4 of OffsetCommitValue (with the topic id), groups as version 3 of GroupMetadataValue,
as Kafka 4 does; older versions are read. `kafka-dump-log --offsets-decoder` shows them.
Upstream: group-coordinator's OffsetCommitKey/Value, GroupMetadataKey/Value, GroupCoordinatorRecordHelpers.
"""

import struct
from typing import Annotated, NamedTuple

from headwater.broker.wire.errors import MalformedMessage
from headwater.broker.wire.message import (
    NO_UUID,
    Bytes,
    Int32,
    Int64,
    Message,
    NullableString,
    String,
    Structure,
    Uuid,
    since,
    tagged,
)
from headwater.broker.wire.record import NewRecord, Record

VERSION = struct.Struct(">h")
OFFSET_KEY, GROUP_KEY = 1, 2
OFFSET_VALUE, GROUP_VALUE = 4, 3


class OffsetCommitKey(Message):
    group: String
    topic: String
    partition: Int32


class OffsetCommitValue(Message):
    FLEXIBLE = 4
    offset: Int64
    leader_epoch: Annotated[Int32, since(3)] = -1
    metadata: String = ""
    commit_timestamp: Int64 = 0
    expire_timestamp: Annotated[Int64, since(1, 1)] = -1
    topic_id: Annotated[Uuid, tagged(0, 4)] = NO_UUID


class GroupMetadataKey(Message):
    group: String


class MemberMetadata(Structure):
    member_id: String
    group_instance_id: Annotated[NullableString, since(3)] = None
    client_id: String = ""
    client_host: String = ""
    rebalance_timeout: Annotated[Int32, since(1)] = -1
    session_timeout: Int32 = 0
    subscription: Bytes = b""
    assignment: Bytes = b""


class GroupMetadataValue(Message):
    FLEXIBLE = 4
    protocol_type: String
    generation: Int32
    protocol: NullableString
    leader: NullableString
    current_state_timestamp: Annotated[Int64, since(2)] = -1
    members: list[MemberMetadata] = []


class OffsetRecord(NamedTuple):
    group: str
    topic: str
    partition: int
    value: OffsetCommitValue | None


class GroupRecord(NamedTuple):
    group: str
    value: GroupMetadataValue | None


def offset_record(record: OffsetRecord, now_ms: int) -> NewRecord:
    key = OffsetCommitKey(record.group, record.topic, record.partition).encode(OFFSET_KEY)
    value = None if record.value is None else VERSION.pack(OFFSET_VALUE) + record.value.encode(OFFSET_VALUE)
    return NewRecord(VERSION.pack(OFFSET_KEY) + key, value, now_ms)


def group_record(record: GroupRecord, now_ms: int) -> NewRecord:
    key = GroupMetadataKey(record.group).encode(GROUP_KEY)
    value = None if record.value is None else VERSION.pack(GROUP_VALUE) + record.value.encode(GROUP_VALUE)
    return NewRecord(VERSION.pack(GROUP_KEY) + key, value, now_ms)


def decode(record: Record) -> OffsetRecord | GroupRecord | None:
    """None for a kind of record that is not known here: consumer and share groups'. Raises MalformedMessage."""
    if record.key is None:
        raise MalformedMessage("a record of __consumer_offsets has no key")
    (version,) = VERSION.unpack_from(record.key)
    value_version = VERSION.unpack_from(record.value)[0] if record.value is not None else 0
    if version <= OFFSET_KEY:
        key = OffsetCommitKey.decode(record.key, version, VERSION.size)
        offset = None
        if record.value is not None:
            offset = OffsetCommitValue.decode(record.value, value_version, VERSION.size)
        return OffsetRecord(key.group, key.topic, key.partition, offset)
    if version == GROUP_KEY:
        name = GroupMetadataKey.decode(record.key, version, VERSION.size).group
        group = None
        if record.value is not None:
            group = GroupMetadataValue.decode(record.value, value_version, VERSION.size)
        return GroupRecord(name, group)
    return None

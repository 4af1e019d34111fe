"""The committed offsets of one group, and when they are forgotten (KIP-211).

An offset expires `offsets.retention.minutes` after the group became empty, for a group whose members subscribe; after
its commit, for a group without members that somebody commits for ("simple"), and for topics that a living group
doesn't subscribe to any more. An expiry that an old client asked for itself (OffsetCommit 2-4) counts instead.
Upstream: OffsetMetadataManager, OffsetExpirationConditionImpl.
"""

from collections.abc import Callable
from typing import NamedTuple

from headwater.broker.group.records import OffsetCommitValue
from headwater.broker.wire.message import NO_UUID

OffsetKey = tuple[str, int]


class CommittedOffset(NamedTuple):
    offset: int
    leader_epoch: int = -1
    metadata: str = ""
    commit_timestamp: int = 0
    expire_timestamp: int = -1
    topic_id: bytes = NO_UUID

    @classmethod
    def of(cls, value: OffsetCommitValue) -> "CommittedOffset":
        return cls(
            value.offset,
            value.leader_epoch,
            value.metadata,
            value.commit_timestamp,
            value.expire_timestamp,
            value.topic_id,
        )

    def value(self) -> OffsetCommitValue:
        return OffsetCommitValue(
            self.offset, self.leader_epoch, self.metadata, self.commit_timestamp, self.expire_timestamp, self.topic_id
        )


def expired(
    offsets: dict[OffsetKey, CommittedOffset],
    base_of: Callable[[str, CommittedOffset], int | None],
    retention_ms: int,
    now_ms: int,
) -> list[OffsetKey]:
    """The offsets to forget. `base_of` is the time that the retention counts from; None keeps the offset."""
    gone = []
    for key, committed in offsets.items():
        if committed.expire_timestamp >= 0:
            if now_ms >= committed.expire_timestamp:
                gone.append(key)
            continue
        base = base_of(key[0], committed)
        if base is not None and base + retention_ms <= now_ms:
            gone.append(key)
    return gone

"""The group coordinator: finds the group, lets it decide, keeps what it says, answers when that is durable.

Every answer that rests on the log waits until the log is durable up to its end at the time of the decision; so do the
answers to reads, or a commit could be seen and then be lost.

Sessions are watched by one timer, set to the earliest deadline. When it rings late, because the loop or the whole
process stood still, every session is extended by that time: the members' heartbeats could not arrive.
Upstream: GroupCoordinatorService, GroupCoordinatorShard, OffsetMetadataManager.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from headwater.broker.broker_config import BrokerConfig
from headwater.broker.group.classic import EMPTY, STABLE, ClassicGroup, Decision, Join, JoinAnswer, Sync, SyncAnswer
from headwater.broker.group.offsets import CommittedOffset, OffsetKey, expired
from headwater.broker.group.records import (
    GroupRecord,
    OffsetRecord,
    decode,
    group_record,
    offset_record,
)
from headwater.broker.wire.errors import ErrorCode, MalformedMessage, ProtocolError
from headwater.broker.wire.message import NO_UUID
from headwater.broker.wire.record import NewRecord, Record
from headwater.clock import Clock

logger = logging.getLogger(__name__)

MAX_ID_PREFIX = 1000  # of a client id that becomes part of a member id
IO_TURN_SECONDS = 0.01
STALL_SECONDS = 0.5  # the timer rang this much too late: nobody's heartbeat could be heard


class DurableLog(Protocol):
    def wait_durable(self, end_offset: int, then: Callable[[], None]) -> None: ...


AppendRecords = Callable[[list[NewRecord]], tuple[DurableLog, int]]


class Commit(NamedTuple):
    """One partition of an OffsetCommit."""

    topic: str
    partition: int
    committed: CommittedOffset


class GroupCoordinator:
    def __init__(
        self, config: BrokerConfig, clock: Clock, loop: asyncio.AbstractEventLoop, append: AppendRecords
    ) -> None:
        self.groups: dict[str, ClassicGroup] = {}
        self._config = config
        self._clock = clock
        self._loop = loop
        self._append = append
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    # Loading

    def load(self, records: Iterable[Record]) -> None:
        """A start: the log's records are applied, and nothing else."""
        now, now_ms = self._clock.monotonic(), self._clock.now_ms()
        for record in records:
            try:
                kept = decode(record)
            except MalformedMessage as error:
                logger.error("group_record_left_out offset=%d reason=%s", record.offset, error)
                continue
            if isinstance(kept, GroupRecord):
                if kept.value is None:
                    self.groups.pop(kept.group, None)
                else:
                    self._group(kept.group, now_ms).restore(kept.value, now)
            elif kept is not None:
                self._apply_offset(kept, now_ms)
        self._watch()

    def check_offsets(self, log_end: Callable[[str, int], int | None], topic_ids: Mapping[str, bytes]) -> None:
        """What a crash or a deletion made untrue: offsets of a topic that is gone or another one, or beyond a log's end."""
        for group in self.groups.values():
            for (topic, partition), committed in list(group.offsets.items()):
                if committed.topic_id not in (NO_UUID, topic_ids.get(topic)):
                    del group.offsets[topic, partition]
                    continue
                end = log_end(topic, partition)
                if end is not None and committed.offset > end:
                    logger.error(
                        "committed_offset_clamped group=%s topic=%s partition=%d committed=%d log_end=%d",
                        group.group_id, topic, partition, committed.offset, end,
                    )  # fmt: skip
                    group.offsets[topic, partition] = committed._replace(offset=end)

    def _group(self, group_id: str, now_ms: int) -> ClassicGroup:
        group = self.groups.get(group_id)
        if group is None:
            delay = self._config.number("group.initial.rebalance.delay.ms")
            group = self.groups[group_id] = ClassicGroup(group_id, delay, self._config.number("group.max.size"), now_ms)
        return group

    def _apply_offset(self, record: OffsetRecord, now_ms: int) -> None:
        if record.value is None:
            group = self.groups.get(record.group)
            if group is not None:
                group.offsets.pop((record.topic, record.partition), None)
        else:
            offsets = self._group(record.group, now_ms).offsets
            offsets[record.topic, record.partition] = CommittedOffset.of(record.value)

    # Membership

    def new_member_id(self, prefix: str) -> str:
        return f"{prefix[:MAX_ID_PREFIX]}-{uuid.uuid4()}"

    def join(self, group_id: str, request: Join) -> None:
        now_ms = self._clock.now_ms()
        if not group_id:
            request.ticket(JoinAnswer(ErrorCode.INVALID_GROUP_ID, request.member_id))
            return
        low, high = (self._config.number(f"group.{bound}.session.timeout.ms") for bound in ("min", "max"))
        if not low <= request.session_timeout_ms <= high:
            request.ticket(JoinAnswer(ErrorCode.INVALID_SESSION_TIMEOUT, request.member_id))
            return
        if group_id not in self.groups and request.member_id:
            request.ticket(JoinAnswer(ErrorCode.UNKNOWN_MEMBER_ID, request.member_id))
            return
        is_new = group_id not in self.groups
        group = self._group(group_id, now_ms)
        decision = group.join(request, self._clock.monotonic(), now_ms)
        decision.keep = decision.keep or is_new
        self._carry_out(group, decision)

    def sync(self, group_id: str, request: Sync) -> None:
        group = self.groups.get(group_id)
        if not group_id or group is None:
            code = ErrorCode.UNKNOWN_MEMBER_ID if group_id else ErrorCode.INVALID_GROUP_ID
            request.ticket(SyncAnswer(code))
            return
        decision = group.sync(request, self._clock.monotonic(), self._clock.now_ms())
        self._carry_out(group, decision)

    def heartbeat(self, group_id: str, member_id: str, group_instance_id: str | None, generation: int) -> int:
        if not group_id:
            return ErrorCode.INVALID_GROUP_ID
        try:
            self._existing(group_id).heartbeat(member_id, group_instance_id, generation, self._clock.monotonic())
        except ProtocolError as error:
            return error.code
        return ErrorCode.NONE

    def leave(
        self,
        group_id: str,
        leaving: list[tuple[str, str | None]],
        done: Callable[[list[int]], None],
    ) -> None:
        """`done` is told the error codes. Raises ProtocolError INVALID_GROUP_ID."""
        if not group_id:
            raise ProtocolError(ErrorCode.INVALID_GROUP_ID)
        group = self.groups.get(group_id)
        if group is None:
            done([ErrorCode.UNKNOWN_MEMBER_ID] * len(leaving))
            return
        decision = Decision()
        codes = group.leave(leaving, decision, self._clock.monotonic(), self._clock.now_ms())
        self._carry_out(group, decision, lambda: done(codes), lambda code: done([code] * len(leaving)))

    def _existing(self, group_id: str) -> ClassicGroup:
        group = self.groups.get(group_id)
        if group is None:
            raise ProtocolError(ErrorCode.UNKNOWN_MEMBER_ID)
        return group

    def _carry_out(
        self,
        group: ClassicGroup,
        decision: Decision,
        then: Callable[[], None] | None = None,
        failed: Callable[[int], None] | None = None,
    ) -> None:
        """Keep what is to be kept, and give the answers when it is durable."""

        def give() -> None:
            for ticket, what in decision.answers:
                ticket(what)
            if then is not None:
                then()

        self._watch(group)
        if not decision.keep:
            give()
            return
        try:
            log, end = self._append([group_record(GroupRecord(group.group_id, group.value()), self._clock.now_ms())])
        except ProtocolError as error:
            for ticket, what in decision.answers:
                ticket(what._replace(error_code=error.code))
            if failed is not None:
                failed(error.code)
            # What could not be kept did not happen: the members come together again.
            again = Decision()
            group.rebalance(again, self._clock.monotonic(), self._clock.now_ms())
            for ticket, what in again.answers:
                ticket(what)
            self._watch(group)
            return
        log.wait_durable(end, give)

    # Offsets

    def commit(
        self,
        group_id: str,
        member_id: str,
        group_instance_id: str | None,
        generation: int,
        commits: list[Commit],
        unknown_group: ErrorCode,
        done: Callable[[dict[OffsetKey, int]], None],
    ) -> None:
        """`done` is told the error code of each partition when the commit is durable. Raises ProtocolError."""
        now, now_ms = self._clock.monotonic(), self._clock.now_ms()
        group = self.groups.get(group_id)
        if group is None:
            if generation >= 0:
                raise ProtocolError(unknown_group)
            group = self._group(group_id, now_ms)
        group.commit_check(member_id, group_instance_id, generation, now)
        limit = self._config.number("offset.metadata.max.bytes")
        codes: dict[OffsetKey, int] = {}
        records = []
        accepted: dict[OffsetKey, CommittedOffset] = {}
        for topic, partition, committed in commits:
            if len(committed.metadata) > limit:
                codes[topic, partition] = ErrorCode.OFFSET_METADATA_TOO_LARGE
                continue
            codes[topic, partition] = ErrorCode.NONE
            committed = committed._replace(commit_timestamp=now_ms)
            records.append(offset_record(OffsetRecord(group_id, topic, partition, committed.value()), now_ms))
            accepted[topic, partition] = committed
        log, end = self._append(records)
        group.offsets.update(accepted)
        log.wait_durable(end, lambda: done(codes))

    def wait_durable(self, then: Callable[[], None]) -> None:
        """For reads: what they saw must not be lost. Raises ProtocolError."""
        log, end = self._append([])
        log.wait_durable(end, then)

    def delete_offsets(
        self, group_id: str, keys: list[OffsetKey], done: Callable[[dict[OffsetKey, int]], None]
    ) -> None:
        """Raises ProtocolError INVALID_GROUP_ID, GROUP_ID_NOT_FOUND or NON_EMPTY_GROUP."""
        if not group_id:
            raise ProtocolError(ErrorCode.INVALID_GROUP_ID)
        group = self.groups.get(group_id)
        if group is None:
            raise ProtocolError(ErrorCode.GROUP_ID_NOT_FOUND)
        subscribed: set[str] | None = set()
        if group.state is not EMPTY:
            if group.protocol_type != "consumer":
                raise ProtocolError(ErrorCode.NON_EMPTY_GROUP)
            subscribed = group.subscribed_topics()
        codes: dict[OffsetKey, int] = {}
        gone = []
        for key in keys:
            if subscribed is None or key[0] in subscribed:
                codes[key] = ErrorCode.GROUP_SUBSCRIBED_TO_TOPIC
                continue
            codes[key] = ErrorCode.NONE
            if key in group.offsets:
                gone.append(key)
        self._forget(group, gone, lambda: done(codes))

    def delete_group(self, group_id: str, done: Callable[[int], None]) -> None:
        group = self.groups.get(group_id)
        if group is None:
            done(ErrorCode.GROUP_ID_NOT_FOUND)
        elif group.state is not EMPTY:
            done(ErrorCode.NON_EMPTY_GROUP)
        else:
            try:
                self._forget(group, list(group.offsets), lambda: done(ErrorCode.NONE), with_group=True)
            except ProtocolError as error:
                done(error.code)

    def _forget(
        self, group: ClassicGroup, keys: list[OffsetKey], then: Callable[[], None], with_group: bool = False
    ) -> None:
        now_ms = self._clock.now_ms()
        records = [offset_record(OffsetRecord(group.group_id, *key, None), now_ms) for key in keys]
        if with_group:
            records.append(group_record(GroupRecord(group.group_id, None), now_ms))
        log, end = self._append(records)
        for key in keys:
            group.offsets.pop(key, None)
        if with_group:
            self.groups.pop(group.group_id, None)
        log.wait_durable(end, then)

    def topic_deleted(self, topic: str) -> None:
        for group in self.groups.values():
            keys = [key for key in group.offsets if key[0] == topic]
            if keys:
                try:
                    self._forget(group, keys, lambda: None)
                except ProtocolError as error:
                    logger.warning("offsets_kept group=%s topic=%s reason=%s", group.group_id, topic, error.code.name)

    def expire_offsets(self) -> None:
        """What nobody has used for `offsets.retention.minutes`, and groups that have nothing left."""
        now_ms = self._clock.now_ms()
        retention_ms = self._config.number("offsets.retention.minutes") * 60_000
        for group in list(self.groups.values()):
            base_of = _expiry_base(group)
            gone = expired(group.offsets, base_of, retention_ms, now_ms) if base_of is not None else []
            empty = group.state is EMPTY and len(gone) == len(group.offsets)
            if gone or empty:
                try:
                    self._forget(group, gone, lambda: None, with_group=empty)
                except ProtocolError as error:
                    logger.warning("offsets_kept group=%s reason=%s", group.group_id, error.code.name)

    # Time

    def _watch(self, *groups: ClassicGroup) -> None:
        """Set the timer to the earliest deadline of the groups, if it rings later."""
        deadlines = [group.next_deadline() for group in (groups or self.groups.values())]
        earliest = min((deadline for deadline in deadlines if deadline is not None), default=None)
        if earliest is None or (self._timer is not None and self._timer_at <= earliest):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = earliest
        self._timer = self._loop.call_later(max(earliest - self._clock.monotonic(), 0), self._ring)

    def _ring(self) -> None:
        """Not before the sockets were read once more: after a standstill the members' heartbeats lie there."""
        late = self._clock.monotonic() - self._timer_at
        if late > STALL_SECONDS:
            logger.warning("broker_stood_still seconds=%.3f effect=sessions_extended", late)
            for group in self.groups.values():
                group.extend_sessions(late)
        self._timer = self._loop.call_later(IO_TURN_SECONDS, self._expire_due)

    def _expire_due(self) -> None:
        self._timer = None
        now, now_ms = self._clock.monotonic(), self._clock.now_ms()
        for group in list(self.groups.values()):
            deadline = group.next_deadline()
            if deadline is not None and deadline <= now:
                try:
                    self._carry_out(group, group.expire(now, now_ms))
                except Exception:
                    logger.exception("group_expiry_failed group=%s", group.group_id)
        self._watch()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _expiry_base(group: ClassicGroup) -> Callable[[str, CommittedOffset], int | None] | None:
    """The time from which a group's offsets are kept; None keeps them all."""
    if group.protocol_type is None:
        return lambda topic, committed: committed.commit_timestamp
    if group.state is EMPTY:
        since_ms = group.state_timestamp_ms
        return lambda topic, committed: since_ms if since_ms >= 0 else committed.commit_timestamp
    subscribed = group.subscribed_topics() if group.state is STABLE else None
    if subscribed is None:
        return None
    topics = subscribed
    return lambda topic, committed: None if topic in topics else committed.commit_timestamp

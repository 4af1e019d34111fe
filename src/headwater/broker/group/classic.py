"""A classic consumer group: its states and what moves it between them (KIP-62, KIP-345, KIP-394, KIP-429, KIP-559).

    Empty -> PreparingRebalance -> CompletingRebalance -> Stable, and back to PreparingRebalance from each.

A member joins and waits until all have joined; the leader is told who they are, works out who reads what, and hands it
in with its SyncGroup, for which the others wait. Each round is a generation, and a member that speaks of another one is
refused.

No clock, no sockets, no log: every call gets `now`, and says in a Decision which requests to answer and what to keep.
A request that has to wait is a ticket, which comes back in a later Decision. Only a whole generation is kept:
what a rebalance has come to so far is lost in a crash, as in Kafka, and the members join again.

Upstream: ClassicGroup, GroupMetadataManager#classicGroupJoin and below.
"""

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from headwater.broker.group.offsets import CommittedOffset, OffsetKey
from headwater.broker.group.records import GroupMetadataValue, MemberMetadata
from headwater.broker.wire.errors import ErrorCode, ProtocolError

NEW_MEMBER_JOIN_SECONDS = 300.0  # a member that never saw a generation may wait this long (GroupCoordinatorConfig)
CONSUMER = "consumer"

Protocols = list[tuple[str, bytes]]


class GroupState(StrEnum):
    EMPTY = "Empty"
    PREPARING_REBALANCE = "PreparingRebalance"
    COMPLETING_REBALANCE = "CompletingRebalance"
    STABLE = "Stable"


EMPTY = GroupState.EMPTY
PREPARING = GroupState.PREPARING_REBALANCE
COMPLETING = GroupState.COMPLETING_REBALANCE
STABLE = GroupState.STABLE


class JoinedMember(NamedTuple):
    member_id: str
    group_instance_id: str | None
    metadata: bytes


class JoinAnswer(NamedTuple):
    error_code: int
    member_id: str
    generation: int = -1
    protocol_type: str | None = None
    protocol_name: str | None = None
    leader: str = ""
    members: tuple[JoinedMember, ...] = ()
    skip_assignment: bool = False


class SyncAnswer(NamedTuple):
    error_code: int
    protocol_type: str | None = None
    protocol_name: str | None = None
    assignment: bytes = b""


Ticket: TypeAlias = Callable[[JoinAnswer | SyncAnswer], None]
"""A request that waits: it is called with its answer, by whoever carries the decision out."""


class Join(NamedTuple):
    """A JoinGroup request, in the group's terms."""

    ticket: Ticket
    member_id: str
    new_member_id: str
    """The id that a new member gets."""
    group_instance_id: str | None
    client_id: str
    client_host: str
    rebalance_timeout_ms: int
    session_timeout_ms: int
    protocol_type: str
    protocols: Protocols
    must_know_its_id: bool
    """From version 4 on a dynamic member is told its id first and joins with it (KIP-394)."""
    may_skip_assignment: bool
    """From version 9 on a returning static leader can be told who the members are, and not to assign (KIP-814)."""


class Sync(NamedTuple):
    ticket: Ticket
    member_id: str
    group_instance_id: str | None
    generation: int
    protocol_type: str | None
    protocol_name: str | None
    assignments: dict[str, bytes]


@dataclass(slots=True)
class Decision:
    """What follows from a request or from time: answers to give, and whether the group is to be kept as it is now."""

    answers: list[tuple[Ticket, JoinAnswer | SyncAnswer]] = field(default_factory=list)
    keep: bool = False


@dataclass(slots=True)
class Member:
    member_id: str
    group_instance_id: str | None
    client_id: str
    client_host: str
    rebalance_timeout_ms: int
    session_timeout_ms: int
    protocols: Protocols
    deadline: float
    assignment: bytes = b""
    joining: Ticket | None = None
    syncing: Ticket | None = None
    is_new: bool = False

    def metadata(self, protocol: str | None) -> bytes:
        return next((metadata for name, metadata in self.protocols if name == protocol), b"")


class ClassicGroup:
    def __init__(self, group_id: str, initial_delay_ms: int, max_size: int, now_ms: int) -> None:
        self.group_id = group_id
        self.state = EMPTY
        self.generation = 0
        self.protocol_type: str | None = None
        self.protocol: str | None = None
        self.leader: str | None = None
        self.members: dict[str, Member] = {}
        self.state_timestamp_ms = now_ms
        self.offsets: dict[OffsetKey, CommittedOffset] = {}
        self._initial_delay_ms = initial_delay_ms
        self._max_size = max_size
        self._static: dict[str, str] = {}
        self._pending: dict[str, float] = {}  # ids that were given out, and until when
        self._pending_sync: set[str] = set()
        self._join_deadline: float | None = None
        self._sync_deadline: float | None = None
        self._initial_left_ms: int | None = None
        self._new_member_joined = False

    # Joining

    def join(self, request: Join, now: float, now_ms: int) -> Decision:
        """Answers with errors are in the decision too."""
        decision = Decision()
        try:
            self._check_size(request)
            self._check_protocols(request)
            if request.member_id:
                self._join_existing(request, decision, now, now_ms)
            else:
                self._join_new(request, decision, now, now_ms)
        except ProtocolError as error:
            member_id = request.member_id
            if error.code == ErrorCode.MEMBER_ID_REQUIRED:
                member_id = request.new_member_id
            elif error.code == ErrorCode.GROUP_MAX_SIZE_REACHED:
                member_id = ""
            decision.answers.append((request.ticket, JoinAnswer(error.code, member_id)))
        return decision

    def _check_size(self, request: Join) -> None:
        if self.state is EMPTY:
            return
        known = self.members.get(request.member_id)
        if self.state is PREPARING:
            waiting = sum(member.joining is not None for member in self.members.values())
            room = (known is not None and known.joining is not None) or waiting < self._max_size
        else:
            room = known is not None or len(self.members) < self._max_size
        if not room:
            raise ProtocolError(ErrorCode.GROUP_MAX_SIZE_REACHED)

    def _check_protocols(self, request: Join) -> None:
        supported = bool(request.protocol_type and request.protocols)
        if supported and self.members:
            common = self._common_protocols()
            supported = request.protocol_type == self.protocol_type and any(
                name in common for name, _ in request.protocols
            )
        if not supported:
            raise ProtocolError(ErrorCode.INCONSISTENT_GROUP_PROTOCOL)

    def _common_protocols(self) -> set[str]:
        return set.intersection(*({name for name, _ in member.protocols} for member in self.members.values()))

    def _join_new(self, request: Join, decision: Decision, now: float, now_ms: int) -> None:
        if request.group_instance_id is not None:
            if request.group_instance_id in self._static:
                self._replace_static(request, decision, now, now_ms)
                return
        elif request.must_know_its_id:
            self._pending[request.new_member_id] = now + request.session_timeout_ms / 1000
            raise ProtocolError(ErrorCode.MEMBER_ID_REQUIRED)
        self._add(request, request.new_member_id, decision, now, now_ms)

    def _join_existing(self, request: Join, decision: Decision, now: float, now_ms: int) -> None:
        if request.member_id in self._pending and request.group_instance_id is None:
            del self._pending[request.member_id]
            self._add(request, request.member_id, decision, now, now_ms)
            return
        member = self.validate_member(request.member_id, request.group_instance_id)
        changed = member.protocols != request.protocols
        if (self.state is COMPLETING and not changed) or (
            self.state is STABLE and not changed and member.member_id != self.leader
        ):
            decision.answers.append((request.ticket, self._generation_answer(member)))
        else:
            self._update(member, request)
            self._rebalance_or_complete(decision, now, now_ms)

    def _add(self, request: Join, member_id: str, decision: Decision, now: float, now_ms: int) -> None:
        member = Member(
            member_id,
            request.group_instance_id,
            request.client_id,
            request.client_host,
            request.rebalance_timeout_ms,
            request.session_timeout_ms,
            request.protocols,
            now + NEW_MEMBER_JOIN_SECONDS,
            joining=request.ticket,
            is_new=True,
        )
        if not self.members:
            self.protocol_type = request.protocol_type
        self.members[member_id] = member
        if request.group_instance_id is not None:
            self._static[request.group_instance_id] = member_id
        if self.leader is None:
            self.leader = member_id
        self._new_member_joined = True
        self._rebalance_or_complete(decision, now, now_ms)

    def _update(self, member: Member, request: Join) -> None:
        member.protocols = request.protocols
        member.rebalance_timeout_ms = request.rebalance_timeout_ms
        member.session_timeout_ms = request.session_timeout_ms
        member.joining = request.ticket

    def _replace_static(self, request: Join, decision: Decision, now: float, now_ms: int) -> None:
        """A static member is back without its member id: it gets a new one and keeps what it had (KIP-345)."""
        assert request.group_instance_id is not None
        old_id = self._static[request.group_instance_id]
        member = self.members.pop(old_id)
        if member.joining is not None:
            decision.answers.append((member.joining, JoinAnswer(ErrorCode.FENCED_INSTANCE_ID, old_id)))
        if member.syncing is not None:
            decision.answers.append((member.syncing, SyncAnswer(ErrorCode.FENCED_INSTANCE_ID)))
            member.syncing = None
        old_leader = self.leader or ""
        member.member_id = request.new_member_id
        self.members[member.member_id] = member
        self._static[request.group_instance_id] = member.member_id
        if self.leader == old_id:
            self.leader = member.member_id
        if old_id in self._pending_sync:
            self._pending_sync.discard(old_id)
            self._pending_sync.add(member.member_id)
        self._update(member, request)
        member.deadline = now + member.session_timeout_ms / 1000
        if self.state is STABLE and self._select_protocol() == self.protocol:
            member.joining = None
            decision.keep = True
            answer = self._generation_answer(member, leader=old_leader)
            if request.may_skip_assignment:
                is_leader = member.member_id == self.leader
                answer = self._generation_answer(member, with_members=is_leader)._replace(skip_assignment=is_leader)
            decision.answers.append((request.ticket, answer))
        else:
            self._rebalance_or_complete(decision, now, now_ms)

    def _generation_answer(
        self, member: Member, *, leader: str | None = None, with_members: bool | None = None
    ) -> JoinAnswer:
        leader = (self.leader or "") if leader is None else leader
        if with_members is None:
            with_members = member.member_id == leader
        members = (
            tuple(
                JoinedMember(other.member_id, other.group_instance_id, other.metadata(self.protocol))
                for other in self.members.values()
            )
            if with_members
            else ()
        )
        return JoinAnswer(
            ErrorCode.NONE, member.member_id, self.generation, self.protocol_type, self.protocol, leader, members
        )

    # Rebalancing

    def _rebalance_or_complete(self, decision: Decision, now: float, now_ms: int) -> None:
        if self.state is PREPARING:
            self._complete_when_all_joined(decision, now, now_ms)
        else:
            self._prepare_rebalance(decision, now, now_ms)

    def _prepare_rebalance(self, decision: Decision, now: float, now_ms: int) -> None:
        if self.state is COMPLETING:
            for member in self.members.values():
                member.assignment = b""
                if member.syncing is not None:
                    decision.answers.append((member.syncing, SyncAnswer(ErrorCode.REBALANCE_IN_PROGRESS)))
                    member.syncing = None
                    member.deadline = now + member.session_timeout_ms / 1000
        self._pending_sync.clear()
        self._sync_deadline = None
        was_empty = self.state is EMPTY
        self._enter(PREPARING, now_ms)
        if was_empty:
            rebalance_ms = self._rebalance_timeout_ms()
            self._initial_left_ms = max(rebalance_ms - self._initial_delay_ms, 0)
            self._new_member_joined = False
            self._join_deadline = now + self._initial_delay_ms / 1000
        else:
            self._initial_left_ms = None
            self._join_deadline = now + self._rebalance_timeout_ms() / 1000
            self._complete_when_all_joined(decision, now, now_ms)

    def _complete_when_all_joined(self, decision: Decision, now: float, now_ms: int) -> None:
        if self._initial_left_ms is not None or self._pending:
            return
        if all(member.joining is not None for member in self.members.values()):
            self._complete_join(decision, now, now_ms)

    def _rebalance_timeout_ms(self) -> int:
        return max((member.rebalance_timeout_ms for member in self.members.values()), default=0)

    def _initial_delay_over(self, decision: Decision, now: float, now_ms: int) -> None:
        assert self._initial_left_ms is not None
        if self._new_member_joined and self._initial_left_ms:
            self._new_member_joined = False
            delay = min(self._initial_delay_ms, self._initial_left_ms)
            self._initial_left_ms -= delay
            self._join_deadline = now + delay / 1000
        else:
            self._complete_join(decision, now, now_ms)

    def _complete_join(self, decision: Decision, now: float, now_ms: int) -> None:
        """Everybody has joined, or has had the time to."""
        self._join_deadline = self._initial_left_ms = None
        for member in [m for m in self.members.values() if m.joining is None and m.group_instance_id is None]:
            self._remove(member)
        waiting = [member for member in self.members.values() if member.joining is not None]
        if self.members and not waiting:  # static members that may come back until their session is over
            self._join_deadline = now + self._rebalance_timeout_ms() / 1000
            return
        if waiting and (self.leader is None or self.members[self.leader].joining is None):
            self.leader = waiting[0].member_id
        self.generation += 1
        if not self.members:
            self.protocol = self.leader = None
            self._enter(EMPTY, now_ms)
            decision.keep = True
            return
        self.protocol = self._select_protocol()
        self._enter(COMPLETING, now_ms)
        for member in waiting:
            assert member.joining is not None
            decision.answers.append((member.joining, self._generation_answer(member)))
            member.joining = None
            member.is_new = False
            member.deadline = now + member.session_timeout_ms / 1000
        self._pending_sync = set(self.members)
        self._sync_deadline = now + self._rebalance_timeout_ms() / 1000

    def _select_protocol(self) -> str:
        """Each member votes for the first of its own that all support."""
        common = self._common_protocols()
        votes = Counter(
            next(name for name, _ in member.protocols if name in common) for member in self.members.values()
        )
        return votes.most_common(1)[0][0]

    def _enter(self, state: GroupState, now_ms: int) -> None:
        self.state = state
        self.state_timestamp_ms = now_ms

    def _remove(self, member: Member) -> None:
        del self.members[member.member_id]
        self._pending_sync.discard(member.member_id)
        if member.group_instance_id is not None:
            self._static.pop(member.group_instance_id, None)
        if self.leader == member.member_id:
            self.leader = next(iter(self.members), None)

    def rebalance(self, decision: Decision, now: float, now_ms: int) -> None:
        """The members shall come together again."""
        for member in self.members.values():
            member.assignment = b""
        if self.state in (STABLE, COMPLETING):
            self._prepare_rebalance(decision, now, now_ms)

    # Syncing

    def sync(self, request: Sync, now: float, now_ms: int) -> Decision:
        decision = Decision()
        try:
            if self.state is EMPTY:
                raise ProtocolError(ErrorCode.UNKNOWN_MEMBER_ID)
            member = self.validate_member(request.member_id, request.group_instance_id)
            self._check_generation(request.generation)
            if request.protocol_type not in (None, self.protocol_type) or (
                request.protocol_name not in (None, self.protocol)
            ):
                raise ProtocolError(ErrorCode.INCONSISTENT_GROUP_PROTOCOL)
            if self.state is PREPARING:
                raise ProtocolError(ErrorCode.REBALANCE_IN_PROGRESS)
        except ProtocolError as error:
            decision.answers.append((request.ticket, SyncAnswer(error.code)))
            return decision
        self._pending_sync.discard(member.member_id)
        if not self._pending_sync:
            self._sync_deadline = None
        if self.state is STABLE:
            decision.answers.append((request.ticket, self._sync_answer(member)))
            return decision
        member.syncing = request.ticket
        if member.member_id == self.leader:
            for other in self.members.values():
                other.assignment = request.assignments.get(other.member_id, b"")
            self._enter(STABLE, now_ms)
            decision.keep = True
            for other in self.members.values():
                if other.syncing is not None:
                    decision.answers.append((other.syncing, self._sync_answer(other)))
                    other.syncing = None
                    other.deadline = now + other.session_timeout_ms / 1000
        return decision

    def _sync_answer(self, member: Member) -> SyncAnswer:
        return SyncAnswer(ErrorCode.NONE, self.protocol_type, self.protocol, member.assignment)

    # Living and leaving

    def heartbeat(self, member_id: str, group_instance_id: str | None, generation: int, now: float) -> None:
        """Raises ProtocolError: the answer."""
        member = self.validate_member(member_id, group_instance_id)
        self._check_generation(generation)
        member.deadline = now + member.session_timeout_ms / 1000
        if self.state is PREPARING:
            raise ProtocolError(ErrorCode.REBALANCE_IN_PROGRESS)

    def leave(self, leaving: list[tuple[str, str | None]], decision: Decision, now: float, now_ms: int) -> list[int]:
        """The error code of each (member id, group instance id)."""
        codes: list[int] = []
        for member_id, group_instance_id in leaving:
            try:
                if not member_id and group_instance_id in self._static:
                    member_id = self._static[group_instance_id]
                elif member_id in self._pending:
                    del self._pending[member_id]
                    codes.append(ErrorCode.NONE)
                    continue
                member = self.validate_member(member_id, group_instance_id)
                self._give_up(member, decision)
                codes.append(ErrorCode.NONE)
            except ProtocolError as error:
                codes.append(error.code)
        if ErrorCode.NONE in codes:
            self._rebalance_without_the_gone(decision, now, now_ms)
        return codes

    def _give_up(self, member: Member, decision: Decision) -> None:
        if member.joining is not None:
            decision.answers.append((member.joining, JoinAnswer(ErrorCode.UNKNOWN_MEMBER_ID, "")))
        if member.syncing is not None:
            decision.answers.append((member.syncing, SyncAnswer(ErrorCode.UNKNOWN_MEMBER_ID)))
        self._remove(member)

    def _rebalance_without_the_gone(self, decision: Decision, now: float, now_ms: int) -> None:
        if self.state in (STABLE, COMPLETING):
            self._prepare_rebalance(decision, now, now_ms)
        elif self.state is PREPARING:
            self._complete_when_all_joined(decision, now, now_ms)

    def commit_check(self, member_id: str, group_instance_id: str | None, generation: int, now: float) -> None:
        """Whether an OffsetCommit is accepted. Raises ProtocolError."""
        if generation < 0 and self.state is EMPTY:
            return
        if generation < 0 and not member_id and group_instance_id is None:
            raise ProtocolError(ErrorCode.UNKNOWN_MEMBER_ID)
        member = self.validate_member(member_id, group_instance_id)
        self._check_generation(generation)
        if self.state is COMPLETING:
            raise ProtocolError(ErrorCode.REBALANCE_IN_PROGRESS)
        member.deadline = now + member.session_timeout_ms / 1000

    def validate_member(self, member_id: str, group_instance_id: str | None) -> Member:
        """Raises ProtocolError UNKNOWN_MEMBER_ID or FENCED_INSTANCE_ID."""
        if group_instance_id is not None:
            if group_instance_id not in self._static:
                raise ProtocolError(ErrorCode.UNKNOWN_MEMBER_ID)
            if self._static[group_instance_id] != member_id:
                raise ProtocolError(ErrorCode.FENCED_INSTANCE_ID)
        member = self.members.get(member_id)
        if member is None:
            raise ProtocolError(ErrorCode.UNKNOWN_MEMBER_ID)
        return member

    def _check_generation(self, generation: int) -> None:
        if generation != self.generation:
            raise ProtocolError(ErrorCode.ILLEGAL_GENERATION)

    # Time

    def next_deadline(self) -> float | None:
        deadlines = [deadline for deadline in (self._join_deadline, self._sync_deadline) if deadline is not None]
        deadlines += self._pending.values()
        deadlines += [
            m.deadline for m in self.members.values() if m.is_new or (m.joining is None and m.syncing is None)
        ]
        return min(deadlines, default=None)

    def extend_sessions(self, seconds: float) -> None:
        """The broker itself was away: nobody could send a heartbeat."""
        for member in self.members.values():
            member.deadline += seconds
        for member_id in self._pending:
            self._pending[member_id] += seconds

    def expire(self, now: float, now_ms: int) -> Decision:
        """What has run out by now."""
        decision = Decision()
        gone = [member_id for member_id, deadline in self._pending.items() if deadline <= now]
        for member_id in gone:
            del self._pending[member_id]
        for member in list(self.members.values()):
            waits = member.joining is not None or member.syncing is not None
            if member.deadline <= now and (member.is_new or not waits):
                self._give_up(member, decision)
                gone.append(member.member_id)
        if gone:
            self._rebalance_without_the_gone(decision, now, now_ms)
        if self._join_deadline is not None and self._join_deadline <= now:
            if self._initial_left_ms is not None:
                self._initial_delay_over(decision, now, now_ms)
            else:
                self._complete_join(decision, now, now_ms)
        if self._sync_deadline is not None and self._sync_deadline <= now:
            self._sync_deadline = None
            for member_id in list(self._pending_sync):
                self._give_up(self.members[member_id], decision)
            self._rebalance_without_the_gone(decision, now, now_ms)
        return decision

    # What is kept

    def value(self) -> GroupMetadataValue:
        """The group as it is written to the log."""
        return GroupMetadataValue(
            protocol_type=self.protocol_type or "",
            generation=self.generation,
            protocol=self.protocol,
            leader=self.leader,
            current_state_timestamp=self.state_timestamp_ms,
            members=[
                MemberMetadata(
                    member.member_id,
                    member.group_instance_id,
                    member.client_id,
                    member.client_host,
                    member.rebalance_timeout_ms,
                    member.session_timeout_ms,
                    member.metadata(self.protocol),
                    member.assignment,
                )
                for member in self.members.values()
            ],
        )

    def restore(self, value: GroupMetadataValue, now: float) -> None:
        """The group as the log has it: stable, with a whole session for each member to be heard of."""
        self.protocol_type = value.protocol_type or None
        self.generation = value.generation
        self.protocol = value.protocol
        self.leader = value.leader
        self.state_timestamp_ms = value.current_state_timestamp
        self.members.clear()
        self._static.clear()
        for kept in value.members:
            self.members[kept.member_id] = Member(
                kept.member_id,
                kept.group_instance_id,
                kept.client_id,
                kept.client_host,
                kept.rebalance_timeout if kept.rebalance_timeout >= 0 else kept.session_timeout,
                kept.session_timeout,
                [(value.protocol or "", kept.subscription)],
                now + kept.session_timeout / 1000,
                kept.assignment,
            )
            if kept.group_instance_id is not None:
                self._static[kept.group_instance_id] = kept.member_id
        self.state = STABLE if self.members else EMPTY

    def subscribed_topics(self) -> set[str] | None:
        """The topics that consumers subscribe to; None when that can't be known."""
        if self.protocol_type != CONSUMER or self.protocol is None:
            return set() if self.state is EMPTY else None
        topics: set[str] = set()
        for member in self.members.values():
            try:
                topics.update(_subscription_topics(member.metadata(self.protocol)))
            except (struct.error, UnicodeDecodeError):
                return None
        return topics


def _subscription_topics(metadata: bytes) -> list[str]:
    """ConsumerProtocolSubscription: version i16, topics array of strings, and more that is not needed."""
    (count,) = struct.unpack_from(">i", metadata, 2)
    position = 6
    topics = []
    for _ in range(count):
        (size,) = struct.unpack_from(">h", metadata, position)
        topics.append(metadata[position + 2 : position + 2 + size].decode())
        position += 2 + size
    return topics

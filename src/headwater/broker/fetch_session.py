"""Incremental fetch sessions (KIP-227): a consumer names its partitions once and is told only what has changed.

    session id, epoch    (0, -1) no session   (any, 0) a new one   (id, n) go on   (id, -1) close it

A partition is left out of an answer only when it has no bytes and its high watermark, last stable offset, log start
and error are all as they were answered last. Slots are limited (`max.incremental.fetch.session.cache.slots`); the
session that was not used for longest makes room when it is two minutes old. Partitions are kept by the topic's name
or, from Fetch 13 on, its id. Upstream: FetchSessionCache, FetchManager.
"""

import random
from collections import OrderedDict

from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.fetch import FetchRequest, PartitionAnswer, PartitionFetch, TopicFetch

STALE_SECONDS = 120.0
MAX_EPOCH = (1 << 31) - 1

SessionPartition = tuple[str | bytes, int]


class FetchSession:
    def __init__(self, session_id: int, uses_topic_ids: bool, now: float) -> None:
        self.session_id = session_id
        self.uses_topic_ids = uses_topic_ids
        self.epoch = 1
        self.last_used = now
        self.partitions: dict[SessionPartition, PartitionFetch] = {}
        self._answered: dict[SessionPartition, tuple[int, int, int]] = {}

    def update(self, request: FetchRequest) -> None:
        for topic, partitions in request.topics:
            for partition in partitions:
                self.partitions[topic, partition.partition] = partition
        for topic, indexes in request.forgotten:
            for index in indexes:
                self.partitions.pop((topic, index), None)
                self._answered.pop((topic, index), None)

    def topics(self) -> list[TopicFetch]:
        """What the session asks for, in its order."""
        topics: dict[str | bytes, list[PartitionFetch]] = {}
        for (topic, _), partition in self.partitions.items():
            topics.setdefault(topic, []).append(partition)
        return [TopicFetch(topic, partitions) for topic, partitions in topics.items()]

    def is_news(self, topic: str | bytes, answer: PartitionAnswer) -> bool:
        """Whether the client must be told; remembers what it was told."""
        key = (topic, answer.partition)
        state = (answer.high_watermark, answer.last_stable_offset, answer.log_start_offset)
        if answer.error_code != ErrorCode.NONE:
            self._answered.pop(key, None)  # told again when it is fine
            return True
        if not answer.records and self._answered.get(key) == state:
            return False
        self._answered[key] = state
        if answer.records:  # to the end of the order, so that no partition starves
            partition = self.partitions.pop(key, None)
            if partition is not None:
                self.partitions[key] = partition
        return True


class FetchSessions:
    """The sessions of a broker, least recently used first."""

    def __init__(self, slots: int, random_source: random.Random) -> None:
        self._slots = slots
        self._random = random_source
        self._sessions: OrderedDict[int, FetchSession] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, request: FetchRequest, uses_topic_ids: bool, now: float) -> FetchSession | None:
        """The session to answer in, updated; None for a request without one.

        Raises ProtocolError FETCH_SESSION_ID_NOT_FOUND, INVALID_FETCH_SESSION_EPOCH or FETCH_SESSION_TOPIC_ID_ERROR.
        """
        session_id, epoch = request.session_id, request.session_epoch
        if epoch in (-1, 0):
            self._sessions.pop(session_id, None)
            if epoch == -1 or not self._make_room(now):
                return None
            session = FetchSession(self._new_id(), uses_topic_ids, now)
            session.update(request)
            self._sessions[session.session_id] = session
            return session
        found = self._sessions.get(session_id)
        if found is None:
            raise ProtocolError(ErrorCode.FETCH_SESSION_ID_NOT_FOUND)
        if found.epoch != epoch:
            raise ProtocolError(ErrorCode.INVALID_FETCH_SESSION_EPOCH)
        if found.uses_topic_ids != uses_topic_ids:
            raise ProtocolError(ErrorCode.FETCH_SESSION_TOPIC_ID_ERROR)
        found.epoch = found.epoch % MAX_EPOCH + 1
        found.last_used = now
        self._sessions.move_to_end(session_id)
        found.update(request)
        if not found.partitions:
            del self._sessions[session_id]
            return None
        return found

    def _make_room(self, now: float) -> bool:
        if len(self._sessions) < self._slots:
            return True
        if not self._sessions:
            return False
        oldest = next(iter(self._sessions.values()))
        if now - oldest.last_used <= STALE_SECONDS:
            return False
        del self._sessions[oldest.session_id]
        return True

    def _new_id(self) -> int:
        while True:
            session_id = self._random.randint(1, MAX_EPOCH)
            if session_id not in self._sessions:
                return session_id

"""Fetch (API key 1), versions 4-18.

Behaviour
- Reads end at the high watermark for everybody, read_committed or not: there are no transactions yet.
- An answer holds whole batches from the one with the fetch offset on; the last may be cut off. The first batch comes
  whole, even when it is larger than every limit.
- With fewer than `min_bytes` there is a wait of at most `max_wait_ms`, for anything to change.
- Reads stay within a segment, per partition and request.
- What waits for clients that don't read makes answers smaller: the broker holds about 64 MB for all of them.

Versions
- 7 adds sessions (KIP-227); 9 the leader epoch (KIP-320); 12 is flexible; 13 names topics by id (KIP-516);
  15 moves the replica id into tagged fields (KIP-903); 17 and 18 are for followers.

Deviations: `last_fetched_epoch` is not compared (clients use OffsetForLeaderEpoch); the preferred replica is always
this broker.

Upstream: kafka.server.KafkaApis#handleFetchRequest, ReplicaManager#readFromLog, DelayedFetch.
"""

from headwater.broker.api.request import Request
from headwater.broker.fetch_session import FetchSession
from headwater.broker.partition import Partition
from headwater.broker.purgatory import Delay
from headwater.broker.wire.errors import ErrorCode, ProtocolError
from headwater.broker.wire.fetch import (
    FLEXIBLE,
    TOPIC_IDS,
    FetchRequest,
    PartitionAnswer,
    PartitionFetch,
    TopicAnswer,
    TopicFetch,
    decode_request,
    encode_response,
)

__all__ = ["FLEXIBLE", "serve"]

STALLED_LIMIT = 64 * 1024 * 1024  # bytes that may wait for clients that don't read, about
LEAST_ANSWER = 1024 * 1024
# A partition that is not there (any more) is told when there is something to tell, or when the time is over: its reader
# would come again at once, and again.
WAITS = (ErrorCode.NONE, ErrorCode.UNKNOWN_TOPIC_OR_PARTITION, ErrorCode.UNKNOWN_TOPIC_ID)


def serve(request: Request, frame: memoryview) -> None:
    fetch = decode_request(frame, request.version, request.body)
    node = request.node
    try:
        session = node.sessions.begin(fetch, request.version >= TOPIC_IDS, node.clock.monotonic())
    except ProtocolError as error:
        request.respond_buffers(encode_response([], request.version, error.code))
        return
    wanted = session.topics() if session is not None else fetch.topics
    attempt = Attempt(request, fetch, wanted, session)
    if not attempt.answer_if_ready():
        request.connection.delay = Delay(
            node.loop,
            list(attempt.partitions),
            fetch.max_wait_ms,
            attempt.answer_if_ready,
            attempt.answer,
            request.connection.abort,
        )


class Attempt:
    """One fetch request, tried until it has enough to answer."""

    def __init__(
        self, request: Request, fetch: FetchRequest, wanted: list[TopicFetch], session: FetchSession | None
    ) -> None:
        self._request = request
        self._fetch = fetch
        self._wanted = wanted
        self._session = session
        self._answers: list[TopicAnswer] = []
        self._full = session is None or fetch.session_epoch == 0
        self.partitions: list[Partition] = []

    def answer_if_ready(self) -> bool:
        size, at_once = self._read()
        enough = min(self._fetch.min_bytes, self._fetch.max_bytes)
        if at_once or size >= enough or self._fetch.max_wait_ms <= 0 or not self.partitions:
            self._respond()
            return True
        self._answers = []  # read again when there is more: bytes that wait are not counted anywhere
        return False

    def answer(self) -> None:
        """The time is over: what there is goes out."""
        self._read()
        self._respond()

    def _read(self) -> tuple[int, bool]:
        """Bytes found, and whether more would not help: a partition failed, or is read in an older segment."""
        node = self._request.node
        stalled = self._request.outgoing.stalled_bytes
        left = min(self._fetch.max_bytes, node.config.number("fetch.max.bytes"))
        if stalled:
            left = min(left, max(STALLED_LIMIT - stalled, LEAST_ANSWER))
        size, at_once = 0, False
        self._answers = []
        self.partitions = []
        for topic_key, partitions in self._wanted:
            answers = []
            for wanted in partitions:
                answer = self._read_partition(topic_key, wanted, left, size == 0)
                at_once = at_once or answer.error_code not in WAITS or self._is_behind(answer, wanted)
                size += len(answer.records)
                left = max(left - len(answer.records), 0)
                answers.append(answer)
            self._answers.append(TopicAnswer(topic_key, answers))
        return size, at_once

    def _is_behind(self, answer: PartitionAnswer, wanted: PartitionFetch) -> bool:
        if not answer.records:
            return False
        log = self.partitions[-1].log
        return log.segment_of(wanted.fetch_offset) is not log.active

    def _read_partition(
        self, topic_key: str | bytes, wanted: PartitionFetch, left: int, at_least_one: bool
    ) -> PartitionAnswer:
        node = self._request.node
        try:
            topic = node.topic_of(topic_key)
            partition = node.partition(topic.name, wanted.partition)
            self.partitions.append(partition)
            partition.check_epoch(wanted.current_leader_epoch)
            records = partition.read(wanted.fetch_offset, min(wanted.max_bytes, left), at_least_one)
        except ProtocolError as error:
            return PartitionAnswer(wanted.partition, error.code, -1, -1, -1, b"")
        high_watermark = partition.high_watermark.offset
        return PartitionAnswer(
            wanted.partition, ErrorCode.NONE, high_watermark, high_watermark, partition.log.log_start_offset, records
        )

    def _respond(self) -> None:
        session = self._session
        answers = self._answers
        if session is not None:
            told = [
                TopicAnswer(topic, [answer for answer in partitions if session.is_news(topic, answer) or self._full])
                for topic, partitions in answers
            ]
            answers = [topic for topic in told if topic.partitions]
        session_id = session.session_id if session is not None else 0
        self._request.connection.delay = None
        self._request.respond_buffers(encode_response(answers, self._request.version, ErrorCode.NONE, session_id))

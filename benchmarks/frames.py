"""Requests as bytes, with their size in front: what the load generator sends over and over."""

import struct
import time

from headwater.broker.wire.record import NewRecord, encode_batch


def framed(key: int, version: int, body: bytes) -> bytes:
    request = struct.pack(">hhih", key, version, 1, 5) + b"bench" + body
    return struct.pack(">i", len(request)) + request


def produce(topic: str, record_bytes: int, records: int, acks: int = -1) -> bytes:
    """Produce 8: one batch."""
    now = round(time.time() * 1000)
    batch = bytes(encode_batch([NewRecord(None, bytes(record_bytes), now) for _ in range(records)]))
    name = topic.encode()
    body = struct.pack(">hhi", -1, acks, 30_000) + struct.pack(">ih", 1, len(name)) + name
    return framed(0, 8, body + struct.pack(">iii", 1, 0, len(batch)) + batch)


def fetch(topic: str, offset: int, max_bytes: int, max_wait_ms: int = 500) -> tuple[bytes, int]:
    """Fetch 4; the frame and where its offset lies."""
    name = topic.encode()
    head = struct.pack(">iiiibih", -1, max_wait_ms, 1, max_bytes, 0, 1, len(name)) + name + struct.pack(">ii", 1, 0)
    frame = framed(1, 4, head + struct.pack(">qi", offset, max_bytes))
    return frame, len(frame) - 12

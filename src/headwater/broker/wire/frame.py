"""Frames: every request and response is its size as an i32, then that many bytes.

`FrameReader` is a value machine: the socket fills the buffer that it offers, it answers with whole frames. It offers
the rest of a large frame and a little more, so that one system call rarely fills it exactly (a full read makes libuv
read again before it looks at another connection), and it lends its large buffers from a small pool, because touching
fresh memory costs more than copying into used memory.
"""

import struct

from headwater.broker.wire.errors import MalformedMessage

SIZE = struct.Struct(">i")
SMALL = 32 * 1024  # bytes of buffer that every connection has
SLACK = 16 * 1024  # bytes offered beyond a large frame
POOL_BUFFERS = 8
POOL_BUFFER_SIZE = 2 * 1024 * 1024  # larger buffers are given back to the system


class BufferPool:
    """Large buffers that were used and may be used again; at most 16 MB are kept."""

    def __init__(self) -> None:
        self._spare: list[bytearray] = []

    def take(self, size: int) -> bytearray:
        for i, buffer in enumerate(self._spare):
            if len(buffer) >= size:
                return self._spare.pop(i)
        return bytearray(max(size, POOL_BUFFER_SIZE) if size > POOL_BUFFER_SIZE // 2 else _power_of_two(size))

    def give_back(self, buffer: bytearray) -> None:
        if len(buffer) <= POOL_BUFFER_SIZE and len(self._spare) < POOL_BUFFERS:
            self._spare.append(buffer)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class FrameReader:
    """The bytes of one connection, cut into frames. Frames are views: they hold until the next `offer`."""

    def __init__(self, max_frame_bytes: int, pool: BufferPool) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._pool = pool
        self._small = bytearray(SMALL)
        self._buffer = self._small
        self._view = memoryview(self._buffer)
        self._start = 0  # of the first frame that was not taken yet
        self._end = 0  # of the bytes that have arrived

    @property
    def waiting_bytes(self) -> int:
        return self._end - self._start

    def offer(self) -> memoryview:
        """Where the socket may write; never empty."""
        self._make_room()
        return self._view[self._end :]

    def received(self, count: int) -> None:
        self._end += count

    def next_frame(self) -> memoryview | None:
        """The next whole frame, taken; None when it has not arrived yet. Raises MalformedMessage."""
        start = self._start
        if self._end - start < 4:
            return None
        (size,) = SIZE.unpack_from(self._buffer, start)
        if size < 0 or size > self._max_frame_bytes:
            raise MalformedMessage(
                f"a frame of {size} bytes: sizes are 0 to {self._max_frame_bytes} (socket.request.max.bytes)"
            )
        end = start + 4 + size
        if end > self._end:
            return None
        self._start = end
        return self._view[start + 4 : end]

    def put_back(self, frame: memoryview) -> None:
        """The frame that was taken last is the next one again."""
        self._start -= 4 + len(frame)

    def release(self) -> None:
        """The connection is closed."""
        if self._buffer is not self._small:
            self._view.release()
            self._pool.give_back(self._buffer)
            self._buffer = self._small

    def _make_room(self) -> None:
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = 0
            if self._buffer is not self._small:
                self._use(self._small, 0, 0)
            return
        needed = SMALL
        if end - start >= 4:
            (size,) = SIZE.unpack_from(self._buffer, start)
            needed = 4 + size + SLACK
        if start + needed > len(self._buffer) or (self._buffer is not self._small and needed <= SMALL):
            buffer = self._small if needed <= SMALL else self._buffer
            if len(buffer) < needed:
                buffer = self._pool.take(needed)
            self._use(buffer, start, end)

    def _use(self, buffer: bytearray, start: int, end: int) -> None:
        """Go on in `buffer`, with the bytes from `start` to `end` at its beginning."""
        old, old_view = self._buffer, self._view
        if buffer is old:
            buffer[: end - start] = old[start:end]
        else:
            buffer[: end - start] = old_view[start:end]
            self._view = memoryview(buffer)
            if old is not self._small:
                self._pool.give_back(old)
            self._buffer = buffer
        self._start, self._end = 0, end - start

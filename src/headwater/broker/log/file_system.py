"""The only door to the disk.

Everything that the log does to files goes through `FileSystem` and `File`, so that the tests can put a disk in its
place that forgets unsynced bytes, runs full or fails a chosen call (`headwater.testing.file_system`).

Errors are OSError, as Python raises them; who handles them stands in `headwater.broker.log.partition_log`.
"""

import fcntl
import os
from pathlib import Path
from typing import Protocol

Bytes = bytes | bytearray | memoryview


class File(Protocol):
    """A file that grows at its end. It is closed when nobody refers to it any more.

    Nobody closes a file by hand, because the flusher's thread may be syncing what the loop has just done with.
    """

    def size(self) -> int: ...

    def append(self, data: Bytes) -> None:
        """All of `data` behind the last byte, or OSError and the file as it was."""

    def read(self, position: int, size: int) -> bytes:
        """At most `size` bytes; fewer only at the end of the file."""

    def truncate(self, size: int) -> None: ...

    def sync(self) -> None:
        """Return when the bytes are on the disk (fdatasync). After an error nothing is known of them."""


class FileSystem(Protocol):
    def open(self, path: Path) -> File:
        """The file, for reading and appending; made when missing."""

    def exists(self, path: Path) -> bool: ...

    def list_directory(self, path: Path) -> list[str]: ...

    def make_directory(self, path: Path) -> None:
        """With its parents; one that exists is fine."""

    def rename(self, old: Path, new: Path) -> None: ...

    def remove(self, path: Path) -> None:
        """A missing file is fine."""

    def remove_directory(self, path: Path) -> None:
        """With its files; a missing one is fine."""

    def sync_directory(self, path: Path) -> None:
        """Make the names in the directory durable."""

    def read_file(self, path: Path) -> bytes: ...

    def write_file(self, path: Path, content: bytes) -> None:
        """A file that a crash may take: it is written again, or done without."""

    def replace_file(self, path: Path, content: bytes) -> None:
        """The whole new content or the whole old one, also across a crash: written beside, synced, renamed."""

    def free_bytes(self, path: Path) -> int: ...

    def lock(self, path: Path) -> None:
        """Hold the file until the process ends. Raises BlockingIOError when another process holds it."""


class DiskFile:
    """One open file descriptor; appends are `write` on a known end."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._descriptor).st_size

    def size(self) -> int:
        return self._size

    def append(self, data: Bytes) -> None:
        length = len(data)
        try:
            written = os.pwrite(self._descriptor, data, self._size)
            while written < length:  # a nearly full disk takes a part, then says why not the rest
                written += os.pwrite(self._descriptor, memoryview(data)[written:], self._size + written)
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += length

    def read(self, position: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, position)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        self._size = size

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):  # not when it could not be opened
            os.close(self._descriptor)


class DiskFileSystem:
    """The real one."""

    def __init__(self) -> None:
        self._locks: list[int] = []

    def open(self, path: Path) -> DiskFile:
        return DiskFile(path)

    def exists(self, path: Path) -> bool:
        return path.exists()

    def list_directory(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))

    def make_directory(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_directory(self, path: Path) -> None:
        if path.exists():
            for name in os.listdir(path):
                os.unlink(path / name)
            os.rmdir(path)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read_file(self, path: Path) -> bytes:
        return path.read_bytes()

    def write_file(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)

    def replace_file(self, path: Path, content: bytes) -> None:
        beside = path.with_name(path.name + ".tmp")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(beside, path)
        self.sync_directory(path.parent)

    def free_bytes(self, path: Path) -> int:
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def lock(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        self._locks.append(descriptor)

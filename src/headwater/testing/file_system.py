"""A disk in memory that can lose power, run full, and fail.

Each file has the bytes that were written and the bytes that are safe; `sync` makes the one the other. `power_cut` goes
back to what is safe, and keeps of the rest of each file a prefix that the given random source chooses: real disks write
back what they like. Names are safe when their directory was synced; a file that was synced but whose name was not is
gone, as on a real file system.
"""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

from headwater.broker.log.file_system import Bytes


class MemoryFile:
    def __init__(self, disk: "MemoryFileSystem", content: bytes = b"") -> None:
        self._disk = disk
        self.content = bytearray(content)
        self.safe = bytes(content)

    def size(self) -> int:
        return len(self.content)

    def append(self, data: Bytes) -> None:
        self._disk.check("append")
        if self._disk.used_bytes() + len(data) > self._disk.capacity_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.content += data

    def read(self, position: int, size: int) -> bytes:
        return bytes(self.content[position : position + size])

    def truncate(self, size: int) -> None:
        del self.content[size:]

    def sync(self) -> None:
        self._disk.check("sync")
        self.safe = bytes(self.content)


class MemoryFileSystem:
    def __init__(self, capacity_bytes: int = 1 << 40) -> None:
        self.capacity_bytes = capacity_bytes
        self.fail: Callable[[str], OSError | None] = lambda call: None
        """Asked before each `append`, `sync`, `rename` and `replace`; what it returns is raised."""
        self._files: dict[Path, MemoryFile] = {}
        self._safe_names: dict[Path, MemoryFile] = {}
        self._directories: set[Path] = set()

    def check(self, call: str) -> None:
        error = self.fail(call)
        if error is not None:
            raise error

    def used_bytes(self) -> int:
        return sum(len(file.content) for file in self._files.values())

    def open(self, path: Path) -> MemoryFile:
        if path not in self._files:
            if path.parent not in self._directories:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            self._files[path] = MemoryFile(self)
        return self._files[path]

    def exists(self, path: Path) -> bool:
        return path in self._files or path in self._directories

    def list_directory(self, path: Path) -> list[str]:
        names = {file.name for file in self._files if file.parent == path}
        return sorted(names | {folder.name for folder in self._directories if folder.parent == path})

    def make_directory(self, path: Path) -> None:
        self._directories.update([path, *path.parents])

    def rename(self, old: Path, new: Path) -> None:
        self.check("rename")
        if old in self._directories:
            for name in [name for name in self._files if name.parent == old]:
                self._files[new / name.name] = self._files.pop(name)
            self._directories.discard(old)
            self._directories.add(new)
        else:
            self._files[new] = self._files.pop(old)

    def remove(self, path: Path) -> None:
        self._files.pop(path, None)

    def remove_directory(self, path: Path) -> None:
        for name in [name for name in self._files if name.parent == path]:
            del self._files[name]
        self._directories.discard(path)

    def sync_directory(self, path: Path) -> None:
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        for name in [name for name in self._safe_names if name.parent == path and name not in self._files]:
            del self._safe_names[name]
        self._safe_names.update({name: file for name, file in self._files.items() if name.parent == path})

    def read_file(self, path: Path) -> bytes:
        if path not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return bytes(self._files[path].content)

    def write_file(self, path: Path, content: bytes) -> None:
        self.check("append")
        file = self._files[path] = MemoryFile(self)
        file.content += content

    def replace_file(self, path: Path, content: bytes) -> None:
        self.check("replace")
        if self.used_bytes() + len(content) > self.capacity_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._files[path] = self._safe_names[path] = MemoryFile(self, content)

    def free_bytes(self, path: Path) -> int:
        return max(self.capacity_bytes - self.used_bytes(), 0)

    def lock(self, path: Path) -> None:
        self.open(path)

    def power_cut(self, random_source: random.Random) -> None:
        """Only what is safe is sure to be there."""
        survivors: dict[Path, MemoryFile] = {}
        for path, file in self._safe_names.items():
            unsynced = bytes(file.content[len(file.safe) :]) if file.content.startswith(file.safe) else b""
            kept = unsynced[: random_source.randint(0, len(unsynced))]
            survivors[path] = MemoryFile(self, file.safe + kept)
        self._files = survivors
        self._safe_names = dict(survivors)

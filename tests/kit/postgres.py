"""PostgreSQL, the real one, on a free port of the loopback address, in a directory that goes when it stops."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.kit.install import postgres_bin
from tests.kit.ports import free_ports
from tests.kit.require import unavailable

START_SECONDS = 30.0


class Postgres:
    def __init__(self, fsync: bool = False, **settings: str) -> None:
        """settings: of the server, besides those that every test has."""
        programs = postgres_bin()
        if programs is None:
            unavailable("PostgreSQL", "run `make test` as root, or install the package postgresql")
        self._programs = programs
        self._fsync = "on" if fsync else "off"
        self._settings = {"wal_level": "logical", "max_slot_wal_keep_size": "1GB", "max_replication_slots": "50",
                          "max_wal_senders": "20", **settings}  # fmt: skip
        self._home = Path(tempfile.mkdtemp(prefix="headwater-postgres-"))
        self.port = free_ports(1)[0]
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> "Postgres":
        if os.geteuid() == 0:
            shutil.chown(self._home, "postgres", "postgres")  # PostgreSQL refuses to run as root
        data = self._home / "data"
        self._run("initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N")
        self.begin()
        return self

    def begin(self) -> None:
        """On the data that is there."""
        data = self._home / "data"
        self._process = subprocess.Popen(
            [
                str(self._programs / "postgres"), "-D", str(data), "-p", str(self.port), "-k", str(self._home),
                "-c", "listen_addresses=127.0.0.1", "-c", f"fsync={self._fsync}", "-c", f"synchronous_commit={self._fsync}",
                "-c", "full_page_writes=off", "-c", "max_connections=200",
                *(f"--{name}={value}" for name, value in self._settings.items()),
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **self._as_postgres(),  # type: ignore[call-overload]
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode:
            assert time.monotonic() < deadline, "PostgreSQL did not start"
            assert self._process.poll() is None, "PostgreSQL ended"
            time.sleep(0.03)

    def set_next_xid(self, xid: int) -> None:
        """As if so many transactions had been. While it is stopped."""
        data = self._home / "data"
        # the page of the commit log that the number is on must be there
        page = data / "pg_xact" / f"{xid // (32 * 8192 * 4):04X}"
        page.write_bytes(bytes(32 * 8192))
        if os.geteuid() == 0:
            shutil.chown(page, "postgres", "postgres")
        self._run("pg_resetwal", "-f", "-x", str(xid), "-D", str(data))

    def end(self) -> None:
        """Stop it; `begin` goes on with its data."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(15)

    def crash(self) -> None:
        """At once, as after a power cut of the process."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(15)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._programs / program), *arguments], check=True, stdout=subprocess.DEVNULL, **self._as_postgres()
        )  # type: ignore[call-overload]

    def _as_postgres(self) -> dict[str, object]:
        if os.geteuid() != 0:
            return {"cwd": self._home}
        return {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": self._home}

"""A real broker for tests: its own process, its own directory, started in a fraction of a second.

    with BrokerProcess.start(tmp_path) as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})

`kill` and `start` on the same directory are a crash and a recovery.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

START_SECONDS = 30.0
STOP_SECONDS = 30.0


class BrokerDidNotStart(RuntimeError):
    """The broker's process ended, or did not answer in time; the message has what it printed."""


class BrokerProcess:
    def __init__(self, process: "subprocess.Popen[bytes]", address: str, data: Path, log: Path) -> None:
        self.process = process
        self.bootstrap_servers = address
        self.data = data
        self.log = log

    @classmethod
    def start(cls, data: Path, settings: Mapping[str, str] | None = None, *, listen: str = "127.0.0.1:0") -> Self:
        """A broker on `data`, when it answers. Raises BrokerDidNotStart."""
        data.parent.mkdir(parents=True, exist_ok=True)
        log = data.with_name(data.name + ".stderr")
        command = [sys.executable, "-m", "headwater", "broker", "--data", str(data), "--listen", listen]
        for name, value in (settings or {}).items():
            command += ["--set", f"{name}={value}"]
        with log.open("ab") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        assert process.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        readable, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
        line = process.stdout.readline().decode() if readable else ""
        if not line.startswith("ready "):
            process.kill()
            process.wait()
            raise BrokerDidNotStart(f"the broker did not become ready: {line}{log.read_text(errors='replace')}")
        return cls(process, line.removeprefix("ready ").strip(), data, log)

    def stop(self) -> int:
        """SIGTERM; the exit code, 0 after a clean stop."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL: what a crash leaves behind."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def peak_resident_bytes(self) -> int:
        """The most it ever had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()

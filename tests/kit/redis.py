"""Redis, the real one, on a free port of the loopback address; it keeps nothing."""

import shutil
import subprocess
import tempfile
import time

import redis

from tests.kit.ports import free_ports
from tests.kit.require import unavailable

START_SECONDS = 15.0


class RedisServer:
    def __init__(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            unavailable("Redis", "run `make test` as root, or install the package redis-server")
        self._home = tempfile.TemporaryDirectory(prefix="headwater-redis-")
        self.port = free_ports(1)[0]
        self.url = f"redis://127.0.0.1:{self.port}"
        command = [str(program), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._home.name, "--save", "",
                   "--appendonly", "no", "--daemonize", "no"]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def start(self) -> "RedisServer":
        deadline = time.monotonic() + START_SECONDS
        client = redis.Redis(port=self.port)
        while True:
            try:
                client.ping()
                client.close()
                return self
            except redis.exceptions.RedisError:
                assert time.monotonic() < deadline, "Redis did not start"
                assert self._process.poll() is None, "Redis ended"
                time.sleep(0.02)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._home.cleanup()

"""`make run`: an example with live traffic, on the engine of your choice, until Ctrl-C.

python -m examples.run shop embedded|kafka|kafka3
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples.shop.web import PORTS

APPS = {
    "shop": [
        "orders", "users", "catalog", "carts", "inventory", "payments", "shipping", "warehouse", "notifications", "loyalty",
        "analytics", "invoices", "history", "audit",
    ]
}  # fmt: skip
WEB = {"shop": PORTS}
START_SECONDS = 60.0


def free_port(wanted: int, who: str) -> int:
    """The usual port when it is free, else another, and says so."""
    for port in (wanted, 0):
        with socket.socket() as each:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                each.bind(("127.0.0.1", port))
            except OSError:
                continue
            found = int(each.getsockname()[1])
            if found != wanted:
                print(f"port {wanted} is in use: {who} listens on {found}", flush=True)
            return found
    raise OSError("no port is free")


class Run:
    """The processes of one run, in a directory that goes when they go."""

    def __init__(self, example: str, engine: str, environment: dict[str, str] | None = None) -> None:
        self.example = example
        self.folder = tempfile.TemporaryDirectory(prefix=f"headwater-{example}-")
        self.data = Path(self.folder.name)
        self.ports = {name: free_port(port, name) for name, port in WEB[example].items()}
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in self.ports.items()}
        self.web_port = self.ports["orders"]
        self.url = self.urls["orders"]
        payment_port = free_port(8090, "the payment gateway")
        self.urls["payment-gateway"] = f"http://127.0.0.1:{payment_port}"
        self._environment = {
            **os.environ, **{f"SHOP_{name.upper()}_PORT": str(port) for name, port in self.ports.items()},
            "SHOP_PAYMENT_URL": self.urls["payment-gateway"], **(environment or {}),
        }  # fmt: skip
        self._environment.pop("HEADWATER_BOOTSTRAP_SERVERS", None)
        self._cluster = None
        if engine == "embedded":
            port = free_port(9092, "the broker")
            self.servers = f"127.0.0.1:{port}"
            where = ["--port", str(port)]
        else:
            from tests.kit.kafka import KafkaCluster

            self._cluster = KafkaCluster(nodes=3 if engine == "kafka3" else 1).start()
            self.servers = self._cluster.bootstrap_servers
            where = ["--bootstrap-servers", self.servers]
        command = [sys.executable, "-m", "headwater", "up", "--data", str(self.data), "--no-registry", *where]
        for name in APPS[example]:
            command += ["--app", f"examples.{example}.{name}:app"]
        gateway = [sys.executable, "-m", "examples._outside.payment", "--port", str(payment_port)]
        self.gateway = subprocess.Popen(gateway, env=self._environment, start_new_session=True)
        self.supervisor = subprocess.Popen(command, env=self._environment, start_new_session=True)

    def wait_ready(self) -> None:
        """Until every service with a web side answers, and the gateway."""
        deadline = time.monotonic() + START_SECONDS
        for url in self.urls.values():
            port = int(url.rpartition(":")[2])
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if self.supervisor.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError("the example did not start; what it printed is above") from None
                    time.sleep(0.05)

    def control(self, action: str, name: str) -> None:
        """`headwater up stop|start NAME`."""
        command = [sys.executable, "-m", "headwater", "up", "--data", str(self.data), action, name]
        subprocess.run(command, check=True, env=self._environment, stdout=subprocess.DEVNULL)

    def stop(self) -> int:
        """The supervisor's exit code."""
        if self.supervisor.poll() is None:
            self.supervisor.send_signal(signal.SIGTERM)
        code = self.supervisor.wait(60)
        self.gateway.terminate()
        self.gateway.wait(10)
        if self._cluster is not None:
            self._cluster.stop()
        self.folder.cleanup()
        return code


def main() -> None:
    parser = argparse.ArgumentParser(description="Run an example with live traffic.")
    parser.add_argument("example", choices=sorted(APPS))
    parser.add_argument("engine", choices=["embedded", "kafka", "kafka3"])
    parser.add_argument("--speed-up", default="21600", help="seconds of 1997 per second")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    run = Run(options.example, options.engine)
    children: list[subprocess.Popen[bytes]] = []
    try:
        run.wait_ready()
        print(
            f"broker {run.servers}   order service {run.url}   data {run.data}   (Ctrl-C stops everything)", flush=True
        )
        package = f"examples.{options.example}"
        feed = [sys.executable, "-m", f"{package}.feed", "--url", run.url, "--speed-up", options.speed_up]
        children.append(subprocess.Popen(feed, start_new_session=True))
        table = [sys.executable, "-m", f"{package}.table", "--data", str(run.data), "--bootstrap-servers", run.servers]
        children.append(subprocess.Popen(table, start_new_session=True))
        run.supervisor.wait()
    except KeyboardInterrupt:
        pass
    finally:
        for child in children:
            child.terminate()
            child.wait()
        code = run.stop()
    sys.exit(code)


if __name__ == "__main__":
    main()

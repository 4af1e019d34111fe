"""`make run`: an example with live traffic, on the engine of your choice, until Ctrl-C.

python -m examples.run shop embedded|kafka|kafka3
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

APPS = {
    "shop": [
        "orders", "users", "catalog", "carts", "inventory", "payments", "shipping", "warehouse", "notifications", "loyalty",
        "analytics", "invoices", "history", "audit",
    ],
    "booking": ["bookings", "availability", "search", "notifications"],
}  # fmt: skip
WEB = {
    # the service, with the variable that tells it where to listen, and where it would otherwise; the first is the one to ask
    "shop": {
        "orders": ("SHOP_ORDERS_PORT", 8000), "users": ("SHOP_USERS_PORT", 8001), "catalog": ("SHOP_CATALOG_PORT", 8002),
        "carts": ("SHOP_CARTS_PORT", 8003), "inventory": ("SHOP_INVENTORY_PORT", 8004), "history": ("SHOP_HISTORY_PORT", 8005),
    },
    "booking": {"bookings": ("BOOKING_PORT", 8000), "search": ("SEARCH_PORT", 8001)},
}  # fmt: skip
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
            if wanted and found != wanted:
                print(f"port {wanted} is in use: {who} listens on {found}", flush=True)
            return found
    raise OSError("no port is free")


def any_port(usual: int, who: str) -> int:
    """For runs beside others."""
    return free_port(0, who)


class Outside:
    """What an example needs that is not of its making, and where it is."""

    def __init__(self, example: str, environment: dict[str, str], port: Callable[[int, str], int]) -> None:
        """environment: of everything that is started. port: finds one, by the usual one and who has it."""
        self.urls: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        """What the applications are told."""
        self._given = environment
        self._processes: list[subprocess.Popen[bytes]] = []
        self._servers: list[Any] = []
        if example == "shop":
            found = port(8090, "the payment gateway")
            self.urls["payment-gateway"] = self.environment["SHOP_PAYMENT_URL"] = f"http://127.0.0.1:{found}"
            self._start("payment", "--port", str(found))
        else:
            self._start_booking(port)

    def _start_booking(self, port: Callable[[int, str], int]) -> None:
        from tests.kit import install
        from tests.kit.opensearch import OpenSearchServer
        from tests.kit.redis import RedisServer

        install.install_packages()
        install.install_opensearch()
        sms, smtp, mails = (port(usual, who) for usual, who in ((8091, "SMS"), (2525, "SMTP"), (8092, "mails")))
        self._start("sms", "--port", str(sms))
        self._start("mail", "--port", str(smtp), "--http-port", str(mails))
        self.urls.update({"sms": f"http://127.0.0.1:{sms}", "mails": f"http://127.0.0.1:{mails}"})
        redis, search = RedisServer(), OpenSearchServer()
        self._servers += [redis, search]
        redis.start()
        search.start()
        self.urls["opensearch"] = search.url
        self.redis_url = redis.url
        self.environment.update({
            "BOOKING_REDIS_URL": redis.url, "BOOKING_OPENSEARCH_URL": search.url, "BOOKING_SMS_URL": self.urls["sms"],
            "BOOKING_SMTP_URL": f"smtp://127.0.0.1:{smtp}",
        })  # fmt: skip

    def _start(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"examples._outside.{name}", *arguments]
        self._processes.append(subprocess.Popen(command, env=self._given, start_new_session=True))

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
            process.wait(10)
        for server in self._servers:
            server.stop()


class Run:
    """The processes of one run, in a directory that goes when they go."""

    def __init__(
        self,
        example: str,
        engine: str,
        environment: dict[str, str] | None = None,
        kafka: dict[str, str] | None = None,
        port: Callable[[int, str], int] = free_port,
    ) -> None:
        """kafka: settings of the Kafka nodes. port: finds one, by the usual one and who has it."""
        self.example = example
        self.folder = tempfile.TemporaryDirectory(prefix=f"headwater-{example}-")
        self.data = Path(self.folder.name)
        ports = {name: (variable, port(usual, name)) for name, (variable, usual) in WEB[example].items()}
        self.urls = {name: f"http://127.0.0.1:{number}" for name, (_, number) in ports.items()}
        self.url = next(iter(self.urls.values()))
        self.environment = {
            **os.environ,
            **{variable: str(number) for variable, number in ports.values()},
            **(environment or {}),
        }
        self.environment.pop("HEADWATER_BOOTSTRAP_SERVERS", None)
        self.outside = Outside(example, self.environment, port)
        self.environment.update(self.outside.environment)
        self.urls.update(self.outside.urls)
        self.cluster: Any = None
        if engine == "embedded":
            number = port(9092, "the broker")
            self.servers = f"127.0.0.1:{number}"
            where = ["--port", str(number)]
        else:
            from tests.kit.kafka import KafkaCluster

            self.cluster = KafkaCluster(nodes=3 if engine == "kafka3" else 1, settings=kafka or {}).start()
            self.servers = self.cluster.bootstrap_servers
            where = ["--bootstrap-servers", self.servers]
        command = [sys.executable, "-m", "headwater", "up", "--data", str(self.data), "--no-registry", *where]
        for name in APPS[example]:
            command += ["--app", f"examples.{example}.{name}:app"]
        self.supervisor = subprocess.Popen(command, env=self.environment, start_new_session=True)

    def wait_ready(self) -> None:
        """Until every service with a web side answers, and what is outside."""
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

    def control(self, action: str, *names: str) -> None:
        """`headwater up stop|start NAME...`."""
        command = [sys.executable, "-m", "headwater", "up", "--data", str(self.data), action, *names]
        subprocess.run(command, check=True, env=self.environment, stdout=subprocess.DEVNULL)

    def pids(self) -> dict[str, int | None]:
        """Of the processes, by name; None of one that doesn't run."""
        command = [sys.executable, "-m", "headwater", "up", "--data", str(self.data), "status", "--json"]
        listed = subprocess.run(command, check=True, env=self.environment, capture_output=True, text=True)
        return {each["name"]: each["pid"] for each in json.loads(listed.stdout)["processes"]}

    def stop(self) -> int:
        """The supervisor's exit code."""
        if self.supervisor.poll() is None:
            self.supervisor.send_signal(signal.SIGTERM)
        code = self.supervisor.wait(60)
        self.outside.stop()
        if self.cluster is not None:
            self.cluster.stop()
        self.folder.cleanup()
        return code


def main() -> None:
    parser = argparse.ArgumentParser(description="Run an example with live traffic.")
    parser.add_argument("example", choices=sorted(APPS))
    parser.add_argument("engine", choices=["embedded", "kafka", "kafka3"])
    parser.add_argument("--speed-up", default="7200", help="seconds of 1997 per second")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    run = Run(options.example, options.engine)
    children: list[subprocess.Popen[bytes]] = []
    try:
        run.wait_ready()
        print(f"broker {run.servers}   data {run.data}   (Ctrl-C stops everything)", flush=True)
        print("   ".join(f"{name} {url}" for name, url in run.urls.items()), flush=True)
        package = f"examples.{options.example}"
        feed = [sys.executable, "-m", f"{package}.feed", "--url", run.url]
        table = [sys.executable, "-m", f"{package}.table"]
        if options.example == "shop":
            feed += ["--speed-up", options.speed_up]
            table += ["--data", str(run.data), "--bootstrap-servers", run.servers]
        children.append(subprocess.Popen(feed, env=run.environment, start_new_session=True))
        children.append(subprocess.Popen(table, env=run.environment, start_new_session=True))
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

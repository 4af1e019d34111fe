"""The schema registry beside Apicurio Registry, which keeps its schemas in memory; ours writes each to a broker that syncs.

Both are asked by the same threads over connections that stay open; the rounds alternate.
"""

import http.client
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.kit.apicurio import Apicurio
from tests.kit.registry import RegistryProcess, body_of

from benchmarks.table import Table
from headwater.testing.broker import BrokerProcess

ROUNDS = 3
SCHEMAS = 1000
MANY = 10_000
LOOKUPS = 4000
CONNECTIONS = 8
MEDIA_TYPE = {"Content-Type": "application/vnd.schemaregistry.v1+json"}


def schema(number: int) -> str:
    fields = [{"name": f"field_{i}", "type": "string"} for i in range(12)]
    return json.dumps(body_of({"type": "record", "name": f"Record{number}", "fields": fields}))


def rate(url: str, count: int, request: Callable[[int], tuple[str, str, str | None]]) -> float:
    """Requests a second over CONNECTIONS connections."""
    host, _, prefix = url.removeprefix("http://").partition("/")
    prefix = f"/{prefix}" if prefix else ""

    def work(first: int) -> None:
        connection = http.client.HTTPConnection(host)
        for number in range(first, count, CONNECTIONS):
            method, path, body = request(number)
            connection.request(method, prefix + path, body, MEDIA_TYPE)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status

    threads = [threading.Thread(target=work, args=(first,)) for first in range(CONNECTIONS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count / (time.perf_counter() - started)


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run() -> None:
    table = Table("Schema registry", ["Apicurio 3.3", "headwater"])
    with tempfile.TemporaryDirectory() as folder, BrokerProcess.start(Path(folder, "data")) as broker:
        started = time.perf_counter()
        theirs = Apicurio().start()
        starts = {"Apicurio 3.3": [1000 * (time.perf_counter() - started)]}
        started = time.perf_counter()
        ours = RegistryProcess.start(broker.bootstrap_servers)
        starts["headwater"] = [1000 * (time.perf_counter() - started)]
        urls = {"Apicurio 3.3": theirs.url, "headwater": ours.url}
        registered: dict[str, list[float]] = {name: [] for name in urls}
        looked: dict[str, list[float]] = {name: [] for name in urls}
        for number in range(ROUNDS):
            for name, url in urls.items():
                first = number * SCHEMAS

                def register(i: int, first: int = first) -> tuple[str, str, str | None]:
                    return "POST", f"/subjects/s{first + i}-value/versions", schema(first + i)

                registered[name].append(rate(url, SCHEMAS, register))
                looked[name].append(
                    rate(url, LOOKUPS, lambda i: ("GET", f"/subjects/s{i % 500}-value/versions/1", None))
                )
        memory = {"Apicurio 3.3": [resident_mb(theirs.pid)], "headwater": [resident_mb(ours.process.pid)]}
        theirs.stop()
        rate(ours.url, MANY, lambda i: ("POST", f"/subjects/many{i}/versions", schema(i)))
        ours.stop()
        started = time.perf_counter()
        with RegistryProcess.start(broker.bootstrap_servers) as again:
            start = 1000 * (time.perf_counter() - started)
            again.ask("GET", "/subjects")
            memory_of_many = resident_mb(again.process.pid)
    table.add("start, empty", "ms", starts, "")
    table.add("registrations", "req/s", registered, "ahead of it")
    table.add("look-ups", "req/s", looked, "ahead of it")
    table.add(f"memory with {ROUNDS * SCHEMAS:,} schemas", "MB", memory, "80")
    table.add(f"start with {MANY + ROUNDS * SCHEMAS:,} versions", "ms", {"headwater": [start]}, "1,000")
    table.add("... memory then", "MB", {"headwater": [memory_of_many]}, "80")
    table.print()

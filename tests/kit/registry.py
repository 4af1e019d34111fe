"""Schema registries as processes: ours, and a small client that shows the raw answers."""

import json
import select
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from types import TracebackType
from typing import Any, NamedTuple, Self

from headwater.kafka.admin import KafkaAdmin
from headwater.registry.leader import GROUP
from headwater.settings import Settings

START_SECONDS = 60.0


class Answer(NamedTuple):
    status: int
    body: Any

    @property
    def code(self) -> int | None:
        """Of an error."""
        return self.body.get("error_code") if isinstance(self.body, dict) else None


class RestClient:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, method=method)
        request.add_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return Answer(answer.status, _read(answer.read()))
        except urllib.error.HTTPError as error:
            return Answer(error.code, _read(error.read()))

    def register(self, subject: str, schema: object, kind: str = "AVRO", **more: object) -> Answer:
        return self.ask("POST", f"/subjects/{subject}/versions", body_of(schema, kind, **more))


def body_of(schema: object, kind: str = "AVRO", **more: object) -> dict[str, object]:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return {"schema": text, **({"schemaType": kind} if kind != "AVRO" else {}), **more}


def _read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


class RegistryProcess(RestClient):
    def __init__(self, process: "subprocess.Popen[bytes]", url: str) -> None:
        super().__init__(url)
        self.process = process

    @classmethod
    def start(cls, bootstrap_servers: str, *arguments: str) -> Self:
        command = [sys.executable, "-m", "headwater", "registry", "--listen", "127.0.0.1:0",
                   "--bootstrap-servers", bootstrap_servers, *arguments]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline().decode() if readable else ""
        if not line.startswith("ready "):
            process.kill()
            process.wait()
            raise RuntimeError(f"the registry did not become ready: {line!r}")
        return cls(process, line.removeprefix("ready ").strip())

    def leads(self, bootstrap_servers: str) -> bool:
        """Whether the group of the registries says that this one writes."""
        members = KafkaAdmin(Settings(bootstrap_servers=bootstrap_servers)).describe_group(GROUP).members
        return any(member.client_id == self.url for member in members if member.partitions)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()

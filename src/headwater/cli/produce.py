"""`headwater produce`: lines from standard input, or one value, to a topic."""

import base64
import json as json_library
import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.progress import Progress

from headwater.cli.output import (
    DEFAULT_SERVERS,
    Json,
    Servers,
    UserError,
    console,
    errors,
    explained,
    key_values,
    settings_for,
    show_json,
)
from headwater.cli.topics import Name
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.producer import Acknowledged, Headers, KafkaProducer, NotPublished, Profile


def produce(
    topic: Name,
    value: Annotated[
        str | None, typer.Option(help="One value; without it every line of standard input is one.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="The key of every record.")] = None,
    key_separator: Annotated[str | None, typer.Option(help="Lines are KEY<separator>VALUE.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; repeatable.")] = None,
    lines_are_json: Annotated[
        bool, typer.Option("--json-lines", help="Lines are {key, value, headers}, as `consume --json` prints.")
    ] = False,
    throughput: Annotated[bool, typer.Option("--throughput", help="Larger batches, compressed.")] = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Write records and wait until they are acknowledged."""
    with explained("produce"):
        settings = settings_for(bootstrap_servers)
        if key_separator == "":
            raise UserError("--key-separator is at least one character.")
        KafkaAdmin(settings).check_reachable()
        headers: Headers = [(name, text.encode()) for name, text in key_values(header or [], "--header").items()]
        producer = KafkaProducer(settings, Profile.THROUGHPUT if throughput else Profile.LATENCY)
        failures: list[NotPublished] = []
        count = acknowledged = 0

        def done(result: Acknowledged | NotPublished) -> None:
            nonlocal acknowledged
            if isinstance(result, NotPublished):
                failures.append(result)
            else:
                acknowledged += 1

        lines = [value] if value is not None else (line.rstrip("\n") for line in sys.stdin)
        trouble: Exception | None = None
        with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task("producing", total=None)
            try:
                for record_key, record_value, own in _records(lines, key, key_separator, lines_are_json):
                    producer.send(topic, record_key, record_value, headers + own, done)
                    count += 1
                    progress.update(task, completed=count)
            except (UserError, UnicodeDecodeError) as error:
                trouble = error
            producer.close()
        if trouble is not None or acknowledged < count:
            why = trouble or (failures[0] if failures else "no answer in time")
            raise UserError(f"{acknowledged} of {count} records were acknowledged: {why}")
        if json:
            show_json({"topic": topic, "produced": count})
        else:
            console.print(f"produced {count} records to {topic}", highlight=False)


def _records(
    lines: Iterable[str], key: str | None, separator: str | None, as_json: bool
) -> Iterable[tuple[bytes | None, bytes | None, Headers]]:
    for number, line in enumerate(lines, 1):
        if as_json:
            yield _json_record(line, number)
            continue
        record_key: str | None = key
        if separator is not None:
            record_key, found, line = line.partition(separator)
            if not found:
                raise UserError(f"line {number} has no {separator!r} between key and value.")
        yield record_key.encode() if record_key is not None else None, line.encode(), []


def content_bytes(content: object) -> bytes | None:
    """Text, `{"base64": ...}` for bytes that are no text, or null. Raises ValueError."""
    if content is None or isinstance(content, str):
        return None if content is None else content.encode()
    if isinstance(content, dict) and set(content) == {"base64"}:
        return base64.b64decode(content["base64"], validate=True)
    raise ValueError('keys, values and headers are text, {"base64": ...} or null')


def _json_record(line: str, number: int) -> tuple[bytes | None, bytes | None, Headers]:
    try:
        record = json_library.loads(line)
        unknown = set(record) - {"key", "value", "headers", "topic", "partition", "offset", "timestamp"}
        if unknown or "value" not in record:
            raise ValueError(
                f"it has {', '.join(sorted(record)) or 'nothing'}; a value is needed, null for a tombstone"
            )
        headers: Headers = [(name, content_bytes(content)) for name, content in record.get("headers") or []]
        return content_bytes(record.get("key")), content_bytes(record.get("value")), headers
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"line {number} is no JSON object with key, value and headers: {error}") from None

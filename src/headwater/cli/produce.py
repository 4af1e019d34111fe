"""`headwater produce`: lines from standard input, or one value, to a topic."""

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
    show_json,
)
from headwater.cli.topics import Name
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.producer import Acknowledged, Headers, KafkaProducer, NotPublished, Profile
from headwater.settings import Settings


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
        settings = Settings(bootstrap_servers)
        KafkaAdmin(settings).check_reachable()
        headers: Headers = [(name, text.encode()) for name, text in key_values(header or [], "--header").items()]
        producer = KafkaProducer(settings, Profile.THROUGHPUT if throughput else Profile.LATENCY)
        failures: list[NotPublished] = []
        count = 0

        def done(result: Acknowledged | NotPublished) -> None:
            if isinstance(result, NotPublished):
                failures.append(result)

        lines = [value] if value is not None else (line.rstrip("\n") for line in sys.stdin)
        with Progress(console=errors, transient=True) as progress:
            task = progress.add_task("producing", total=None)
            for record_key, record_value, own in _records(lines, key, key_separator, lines_are_json):
                producer.send(topic, record_key, record_value, headers + own, done)
                count += 1
                progress.update(task, completed=count)
            producer.close()
        if failures:
            raise UserError(f"{len(failures)} of {count} records were not acknowledged: {failures[0]}")
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


def _json_record(line: str, number: int) -> tuple[bytes | None, bytes | None, Headers]:
    try:
        record = json_library.loads(line)
        value = record.get("value")
        text = value if isinstance(value, str) or value is None else json_library.dumps(value)
        headers: Headers = [(name, str(content).encode()) for name, content in (record.get("headers") or {}).items()]
        key = record.get("key")
        return key.encode() if key is not None else None, text.encode() if text is not None else None, headers
    except (ValueError, AttributeError) as error:
        raise UserError(f"line {number} is no JSON object with key, value and headers: {error}") from None

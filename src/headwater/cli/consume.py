"""`headwater consume`: records of a topic, from an offset or a time on, as they are or as JSON."""

import base64
import json as json_library
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer

from headwater.cli.groups import parse_time_ms, partitions_of
from headwater.cli.output import DEFAULT_SERVERS, Json, Servers, UserError, admin, explained, settings_for
from headwater.cli.topics import Name
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed, Message, headers_of
from headwater.kafka.reader import KafkaReader

TAKE = 500
WAIT_SECONDS = 0.2


def consume(
    topic: Name,
    from_: Annotated[
        str, typer.Option("--from", help="earliest, latest, an offset, -N from the end, or a time: 2026-01-31T08:00.")
    ] = "earliest",
    partition: Annotated[list[int] | None, typer.Option(help="Only these partitions; repeatable.")] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", help="Stop after so many records.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on when the end is reached.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="Print the key before the value.")] = False,
    headers: Annotated[bool, typer.Option("--headers", help="Print the headers before the value.")] = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Print records. Without --follow it ends at the end that the topic has now."""
    with explained("consume"):
        client = admin(bootstrap_servers)
        counts = client.partition_counts()
        if topic not in counts:
            raise UserError(f"there is no topic {topic}. `headwater topics list` shows those that are.")
        places = partitions_of(topic, partition, counts[topic])
        starts = _starts(client, from_, places)
        reader = KafkaReader(settings_for(bootstrap_servers), starts if follow else {})
        try:
            batches = _batches(reader) if follow else reader.up_to(client.last_stable_offsets(places), starts)
            _print_all(batches, count, _as_json if json else lambda message: _as_text(message, keys, headers))
        except ConsumerFailed as error:
            raise UserError(str(error)) from None
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:
            sys.stderr.close()
        finally:
            reader.close()


def _starts(client: KafkaAdmin, text: str, places: list[tuple[str, int]]) -> dict[tuple[str, int], int]:
    earliest, latest = client.start_offsets(places), client.end_offsets(places)
    if text == "earliest":
        return earliest
    if text == "latest":
        return latest
    if text.isdecimal():
        wanted = dict.fromkeys(places, int(text))
    elif text[:1] == "-" and text[1:].isdecimal():
        wanted = {place: latest[place] + int(text) for place in places}
    else:
        wanted = client.offsets_at(places, parse_time_ms(text, "earliest, latest, an offset, -N, or "))
    return {place: min(max(offset, earliest[place]), latest[place]) for place, offset in wanted.items()}


def _batches(reader: KafkaReader) -> Iterator[list[Message]]:
    """What there is, and what comes. Raises ConsumerFailed."""
    while True:
        yield reader.take(TAKE, WAIT_SECONDS)[0]


def _print_all(batches: Iterator[list[Message]], count: int | None, show: Callable[[Message], str]) -> None:
    """count: at most; None: all."""
    printed = 0
    for batch in batches:
        for message in batch if count is None else batch[: count - printed]:
            print(show(message))
        printed += len(batch)
        sys.stdout.flush()
        if count is not None and printed >= count:
            return


def _as_text(message: Message, keys: bool, headers: bool) -> str:
    parts = []
    if keys:
        parts.append(_text(message.key()) or "")
    if headers:
        parts.append(",".join(f"{name}={_text(value)}" for name, value in headers_of(message)))
    value = _text(message.value())
    return "\t".join([*parts, "<tombstone>" if value is None else value])


def _as_json(message: Message) -> str:
    """One line that `produce --json-lines` writes again byte for byte."""
    _, timestamp_ms = message.timestamp()
    record = {
        "topic": message.topic(),
        "partition": message.partition(),
        "offset": message.offset(),
        "timestamp": datetime.fromtimestamp(timestamp_ms / 1000, UTC).isoformat(),
        "key": _content(message.key()),
        "headers": [[name, _content(value)] for name, value in headers_of(message)],
        "value": _content(message.value()),
    }
    return json_library.dumps(record)


def _content(content: bytes | str | None) -> object:
    """Text where it is text, else base64."""
    if not isinstance(content, bytes):
        return content
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def _text(content: bytes | str | None) -> str | None:
    return content.decode("utf-8", "replace") if isinstance(content, bytes) else content

"""`headwater consume`: records of a topic, from an offset or a time on, as they are or as JSON."""

import base64
import json as json_library
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from headwater.cli.groups import parse_time_ms, partitions_of
from headwater.cli.output import DEFAULT_SERVERS, Json, Servers, UserError, admin, explained, settings_for
from headwater.cli.topics import Name
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed, KafkaReader, Message, headers_of

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
        ends = client.end_offsets(places)
        reader = KafkaReader(settings_for(bootstrap_servers), starts)
        try:
            _print_all(reader, starts, None if follow else ends, count, keys, headers, json)
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


def _print_all(
    reader: KafkaReader,
    starts: dict[tuple[str, int], int],
    ends: dict[tuple[str, int], int] | None,
    count: int | None,
    keys: bool,
    headers: bool,
    as_json: bool,
) -> None:
    left = {place for place, end in ends.items() if starts[place] < end} if ends is not None else None
    printed = 0
    while (left is None or left) and (count is None or printed < count):
        messages, ended = reader.take(500, WAIT_SECONDS)
        for message in messages:
            place = (message.topic() or "", message.partition() or 0)
            offset = message.offset() or 0
            if ends is not None and left is not None:
                if offset + 1 >= ends[place]:
                    left.discard(place)
                if offset >= ends[place]:
                    continue
            if count is None or printed < count:
                print(_as_json(message) if as_json else _as_text(message, keys, headers))
                printed += 1
        if left is not None:
            left -= ended.keys()  # the end may hold what is not shown: markers of transactions, gaps of compaction
        sys.stdout.flush()


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

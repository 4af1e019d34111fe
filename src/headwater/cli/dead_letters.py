"""`headwater dead-letters`: list, show, redrive, discard."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.progress import Progress as Bar

from headwater.cli.groups import Group, parse_time_ms
from headwater.cli.output import (
    DEFAULT_SERVERS,
    Json,
    Servers,
    UserError,
    admin,
    console,
    errors,
    explained,
    settings_for,
    show_json,
    show_rows,
)
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.reader import Told, read_all
from headwater.operations.failures import (
    Filter,
    Letter,
    State,
    TopicsOf,
    ask,
    letter_of,
    read_failures,
    topics_of,
    wait_obeyed,
)
from headwater.runtime.retry_topic import DISCARD, REDRIVE, DeadLetter

app = typer.Typer(no_args_is_help=True, help="Events that were given up on: list, show, redrive, discard.")

Topic = Annotated[str | None, typer.Option(help="Only of this source topic.")]
Reason = Annotated[str | None, typer.Option(help="Only those whose error contains this.")]
Kind = Annotated[str | None, typer.Option("--class", help="Only this class: poison or transient.")]
Key = Annotated[str | None, typer.Option(help="Only this key.")]
Since = Annotated[str | None, typer.Option(help="Only those given up on at or after this time.")]
Until = Annotated[str | None, typer.Option(help="Only those given up on before this time.")]
Partition = Annotated[int | None, typer.Option(help="Only this partition.")]
Offset = Annotated[int | None, typer.Option(help="Only this offset of the source.")]
Execute = Annotated[bool, typer.Option("--execute", help="Do it; without it the plan is shown.")]
Rate = Annotated[float | None, typer.Option(help="At most so many a second.", min=0.001)]
Wait = Annotated[float, typer.Option(help="Seconds to wait until the application has obeyed.", min=0)]


@app.command("list")
def list_letters(
    group: Annotated[str, typer.Argument(help="The group, or a dead-letter topic of another framework.")],
    topic: Topic = None,
    reason: Reason = None,
    kind: Kind = None,
    key: Key = None,
    since: Since = None,
    until: Until = None,
    partition: Partition = None,
    offset: Offset = None,
    everything: Annotated[bool, typer.Option("--all", help="Also those that were redriven or discarded.")] = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Dead letters with their reasons, oldest first."""
    with explained("dead-letters list"):
        wanted = _filter(reason, kind, key, since, until, partition, offset)
        found = [
            each
            for each in _read(admin(bootstrap_servers), bootstrap_servers, group, topic)
            if wanted.passes(each.letter) and (everything or each.state in (State.WAITING, State.REQUESTED))
        ]
        if json:
            show_json([_as_json(each) for each in found])
            return
        rows = [
            (
                each.letter.topic,
                each.letter.partition,
                each.letter.source.offset,
                _text(each.letter.source.key),
                _time(each.letter.given_up_ms),
                each.letter.attempted.attempts,
                "held" if each.is_held else each.state.value,
                _one_line(each.letter.attempted.error),
            )
            for each in sorted(found, key=lambda each: each.letter.given_up_ms)
        ]
        columns = ("topic", "partition", "offset", "key", "given up", "attempts", "state", "error")
        show_rows(columns, rows, False, numbers=("partition", "offset", "attempts"), empty="no dead letters")


@app.command()
def show(
    group: Group,
    partition: Annotated[int, typer.Argument(help="The partition.")],
    offset: Annotated[int, typer.Argument(help="The offset in the source topic.")],
    topic: Topic = None,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """One dead letter whole: its value, its headers, what happened to it."""
    with explained("dead-letters show"):
        wanted = Filter(partition=partition, offset=offset)
        found = [e for e in _read(admin(bootstrap_servers), bootstrap_servers, group, topic) if wanted.passes(e.letter)]
        if not found:
            raise UserError(
                f"{group} has no dead letter of offset {offset} of partition {partition}. "
                f"`headwater dead-letters list {group}` shows those that are."
            )
        if json:
            show_json([_as_json(each, whole=True) for each in found])
            return
        for each in found:
            letter, attempted = each.letter, each.letter.attempted
            lines = {
                "source": f"{letter.topic}-{letter.partition} offset {letter.source.offset}",
                "key": _text(letter.source.key),
                "state": "held: its key waits" if each.is_held else each.state.value,
                "error": attempted.error,
                "class": attempted.kind,
                "attempts": attempted.attempts,
                "first failed": _time(attempted.first_failed_ms),
                "given up": _time(letter.given_up_ms),
                **{f"header {name}": _text(_bytes(value)) for name, value in letter.source.headers},
                "value": _text(letter.source.value),
            }
            width = max(len(name) for name in lines)
            for name, value in lines.items():
                console.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def redrive(
    group: Group,
    topic: Topic = None,
    reason: Reason = None,
    kind: Kind = None,
    key: Key = None,
    since: Since = None,
    until: Until = None,
    partition: Partition = None,
    offset: Offset = None,
    rate: Rate = None,
    wait: Wait = 0,
    execute: Execute = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Handle dead letters again, in their own group alone. Without --execute the plan is shown."""
    wanted = (reason, kind, key, since, until, partition, offset)
    with explained("dead-letters redrive"):
        _ask(REDRIVE, bootstrap_servers, group, topic, _filter(*wanted), rate, wait, execute, json)


@app.command()
def discard(
    group: Group,
    topic: Topic = None,
    reason: Reason = None,
    kind: Kind = None,
    key: Key = None,
    since: Since = None,
    until: Until = None,
    partition: Partition = None,
    offset: Offset = None,
    rate: Rate = None,
    wait: Wait = 0,
    execute: Execute = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Decide that dead letters need nothing more; a key that is held goes on. Without --execute the plan is shown."""
    wanted = (reason, kind, key, since, until, partition, offset)
    with explained("dead-letters discard"):
        _ask(DISCARD, bootstrap_servers, group, topic, _filter(*wanted), rate, wait, execute, json)


def _ask(
    action: str,
    servers: str,
    group: str,
    topic: str | None,
    wanted: Filter,
    rate: float | None,
    wait: float,
    execute: bool,
    json: bool,
) -> None:
    client = admin(servers)
    settings = settings_for(servers)
    plan: list[tuple[TopicsOf, list[DeadLetter]]] = []
    for topics in _topics(client, group, topic):
        with _bar("reading", json) as progress:
            failures = read_failures(settings, client, topics, progress)
        letters = [
            each.letter for each in failures.letters if wanted.passes(each.letter) and each.state is State.WAITING
        ]
        if letters:
            plan.append((topics, letters))
    left = 0
    if execute:
        for topics, letters in plan:
            with _bar("asking", json) as progress:
                ask(settings, topics, letters, action, rate, progress)
            if wait:
                left += wait_obeyed(settings, client, topics, letters, wait)
    rows = [
        (each.topic, each.partition, each.source.offset, _text(each.source.key), _one_line(each.attempted.error))
        for _, letters in plan
        for each in letters
    ]
    columns = ("topic", "partition", "offset", "key", "error")
    show_rows(columns, rows, json, numbers=("partition", "offset"), empty="no dead letter is like that")
    if json or not rows:
        return
    if not execute:
        console.print(
            f"{len(rows)} to {action}. Dry run: nothing was changed. Add --execute to do it.", highlight=False
        )
    elif left:
        console.print(
            f"asked; {left} of {len(rows)} still wait: is the application of {group} running?", highlight=False
        )
    else:
        done = "the application has taken them up" if wait else "asked: whoever owns the partitions does it"
        console.print(f"{len(rows)} to {action}: {done}.", highlight=False)


def _topics(client: KafkaAdmin, group: str, topic: str | None) -> list[TopicsOf]:
    """Raises UserError."""
    found = [each for each in topics_of(client, group) if topic is None or each.source == topic]
    if not found:
        raise UserError(
            f"{group} has no retry and dead-letter topics{f' for {topic}' if topic else ''}: "
            "no application of ours with a retry policy has run as this group."
        )
    return found


def _read(client: KafkaAdmin, servers: str, group: str, topic: str | None) -> list[Letter]:
    """Raises UserError."""
    settings = settings_for(servers)
    if not topics_of(client, group) and group in client.partition_counts():
        foreign = (letter_of(message) for message in read_all(settings, client, [group]))
        return [Letter(letter, State.WAITING, False) for letter in foreign if letter is not None]
    found = []
    for topics in _topics(client, group, topic):
        with _bar("reading", False) as progress:
            found += read_failures(settings, client, topics, progress).letters
    return found


@contextmanager
def _bar(what: str, silent: bool) -> Iterator[Told]:
    """A progress bar for what takes longer than a blink, on a terminal."""
    with Bar(console=errors, transient=True, disable=silent or not errors.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _filter(
    reason: str | None,
    kind: str | None,
    key: str | None,
    since: str | None,
    until: str | None,
    partition: int | None,
    offset: int | None,
) -> Filter:
    """Raises UserError."""
    if kind is not None and kind not in ("poison", "transient"):
        raise UserError(f"--class is poison or transient, not {kind!r}.")
    return Filter(
        reason,
        kind,
        os.fsencode(key) if key is not None else None,
        parse_time_ms(since) if since is not None else None,
        parse_time_ms(until) if until is not None else None,
        partition,
        offset,
    )


def _as_json(each: Letter, *, whole: bool = False) -> dict[str, object]:
    letter, attempted = each.letter, each.letter.attempted
    found: dict[str, object] = {
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.source.offset,
        "dead_offset": letter.dead_offset,
        "key": _text(letter.source.key) if letter.source.key is not None else None,
        "given_up_at": _time(letter.given_up_ms),
        "first_failed_at": _time(attempted.first_failed_ms),
        "attempts": attempted.attempts,
        "class": attempted.kind,
        "state": each.state.value,
        "held": each.is_held,
        "error": attempted.error,
    }
    if whole:
        found["headers"] = [[name, _text(_bytes(value))] for name, value in letter.source.headers]
        found["value"] = _text(letter.source.value) if letter.source.value is not None else None
    return found


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _text(value: bytes | None) -> str:
    if value is None:
        return "-"
    try:
        return value.decode()
    except UnicodeDecodeError:
        return repr(value)


def _one_line(text: str) -> str:
    line = text.split("\n")[0]
    return line if len(line) <= 100 else line[:99] + "…"


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

"""`headwater groups`: list, describe with lag and why a partition waits, reset with a dry run, delete."""

import time
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from headwater.cli.output import (
    DEFAULT_SERVERS,
    Json,
    Servers,
    UserError,
    admin,
    console,
    explained,
    settings_for,
    show_json,
    show_rows,
    show_table,
)
from headwater.kafka.admin import KafkaAdmin
from headwater.operations.failures import ParkedKey, read_failures, topics_of
from headwater.operations.lag import partition_rows
from headwater.operations.replay import moved
from headwater.runtime.lane import NO_OFFSET

app = typer.Typer(no_args_is_help=True, help="Consumer groups: list, describe, reset, delete.")


def group_names(incomplete: str) -> list[str]:
    """Tab completion; silent when no broker answers."""
    try:
        return [name for name in sorted(admin(DEFAULT_SERVERS).group_states()) if name.startswith(incomplete)]
    except Exception:
        return []


Group = Annotated[str, typer.Argument(help="The group.", autocompletion=group_names)]


@app.command("list")
def list_groups(bootstrap_servers: Servers = DEFAULT_SERVERS, json: Json = False) -> None:
    """All groups with their state, total lag, parked keys, and partitions that wait."""
    with explained("groups list"):
        client = admin(bootstrap_servers)
        rows = []
        for name, state in sorted(client.group_states().items()):
            partitions = partition_rows(client, name)
            lag = sum(row.lag for row in partitions if row.lag is not None)
            waiting = sum(1 for row in partitions if row.waiting is not None and row.waiting.startswith("for "))
            rows.append((name, state.lower(), lag, sum(row.parked for row in partitions), waiting))
        columns = ("group", "state", "lag", "parked keys", "waiting")
        show_rows(columns, rows, json, numbers=columns[2:], empty="no groups")


@app.command()
def describe(group: Group, bootstrap_servers: Servers = DEFAULT_SERVERS, json: Json = False) -> None:
    """State, members, and per partition the offset, the lag and why it waits."""
    with explained("groups describe"):
        client = admin(bootstrap_servers)
        if group not in client.group_states():
            raise UserError(f"there is no group {group}. `headwater groups list` shows those that are.")
        described = client.describe_group(group)
        rows = partition_rows(client, group)
        parked = parked_keys(client, bootstrap_servers, group)
        if json:
            show_json(
                {
                    "group": group,
                    "state": described.state.lower(),
                    "assignor": described.assignor,
                    "members": [member._asdict() for member in described.members],
                    "partitions": [msgspec.to_builtins(row) for row in rows],
                    "parked": [_parked_json(each) for each in parked],
                }
            )
            return
        console.print(
            f"[bold]{group}[/]  {described.state.lower()}, members {len(described.members)}, "
            f"lag {sum(row.lag or 0 for row in rows)}",
            highlight=False,
        )
        show_table(
            ("topic", "partition", "committed", "end", "lag", "member"),
            [(row.topic, row.partition, row.committed, row.end, row.lag, row.member) for row in rows],
            numbers=("partition", "committed", "end", "lag"),
        )
        for row in rows:
            if row.waiting and row.waiting.startswith("for "):
                line = Text.assemble(("waits", "red"), f" {row.topic}-{row.partition}: {row.waiting}")
                console.print(line, soft_wrap=True)
            if row.replay is not None:
                console.print(
                    f"replays {row.topic}-{row.partition}: {row.replay.start} to {row.replay.end}, "
                    f"new events from {row.replay.until}",
                    highlight=False,
                )
        _show_parked(parked)


MOST_SHOWN = 20


def parked_keys(client: KafkaAdmin, servers: str, group: str) -> list[ParkedKey]:
    """The keys that wait in the group's retry topics."""
    settings = settings_for(servers)
    found: list[ParkedKey] = []
    for topics in topics_of(client, group):
        found += read_failures(settings, client, topics, letters=False).parked
    return found


def _show_parked(parked: list[ParkedKey]) -> None:
    if not parked:
        return
    console.print(
        f"\n[bold]parked[/] {_count(len(parked), 'key')}, {_count(sum(each.events for each in parked), 'event')}",
        highlight=False,
    )
    rows = [
        (
            each.partition, _key_text(each.key), each.offset, each.events,
            each.attempted.attempts if each.attempted else 0, _next_try(each), each.attempted.error if each.attempted else "",
        )
        for each in parked[:MOST_SHOWN]
    ]  # fmt: skip
    numbers = ("partition", "offset", "events", "attempts")
    show_table(("partition", "key", "offset", "events", "attempts", "next", "error"), rows, numbers=numbers)
    if len(parked) > MOST_SHOWN:
        console.print(f"and {len(parked) - MOST_SHOWN} more: --json has all", highlight=False)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _next_try(each: ParkedKey) -> str:
    if each.attempted is None:
        return "now"
    if each.attempted.held != NO_OFFSET:
        return "held"
    seconds = each.attempted.due_ms / 1000 - time.time()
    return f"in {seconds:.0f} s" if seconds > 0 else "now"


def _key_text(key: bytes | None) -> str | None:
    return key.decode("utf-8", "backslashreplace") if key is not None else None


def _parked_json(each: ParkedKey) -> dict[str, object]:
    attempted = each.attempted
    return {
        "topic": each.topic,
        "partition": each.partition,
        "key": _key_text(each.key),
        "offset": each.offset,
        "events": each.events,
        "attempts": attempted.attempts if attempted else 0,
        "due_at_ms": attempted.due_ms if attempted else None,
        "held": attempted is not None and attempted.held != NO_OFFSET,
        "error": attempted.error if attempted else None,
    }


@app.command()
def reset(
    group: Group,
    topic: Annotated[str, typer.Option(help="The topic whose offsets are reset.")],
    to: Annotated[str, typer.Option(help="earliest, latest, an offset, +N or -N, or a time such as 2026-01-31T08:00.")],
    partition: Annotated[list[int] | None, typer.Option(help="Only these partitions; repeatable.")] = None,
    execute: Annotated[bool, typer.Option("--execute", help="Do it; without it the plan is shown.")] = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Move a group's offsets. Without --execute nothing is changed. Refused while the group has members."""
    with explained("groups reset"):
        client = admin(bootstrap_servers)
        counts = client.partition_counts()
        if topic not in counts:
            raise UserError(f"there is no topic {topic}.")
        if group not in client.group_states():
            raise UserError(f"there is no group {group}. `headwater groups list` shows those that are.")
        members = client.describe_group(group).members
        if members:
            raise UserError(
                f"the group {group} has {len(members)} members, which would go on from where they are. Stop them first."
            )
        places = partitions_of(topic, partition, counts[topic])
        positions = client.committed(group)
        committed = {place: position.offset for place, position in positions.items()}
        starts, ends = client.start_offsets(places), client.end_offsets(places)
        targets = offsets_at(client, to, places, committed, starts, ends)
        clamped = {place: min(max(offset, starts[place]), ends[place]) for place, offset in targets.items()}
        if execute:
            moves = {place: (offset, moved(positions.get(place), offset)) for place, offset in clamped.items()}
            client.alter_committed(group, moves)
        rows = [
            (place[0], place[1], committed.get(place), clamped[place], ends[place] - clamped[place]) for place in places
        ]
        show_rows(("topic", "partition", "from", "to", "lag"), rows, json, numbers=("partition", "from", "to", "lag"))
        for place, offset in targets.items():
            if offset != clamped[place] and not json:
                console.print(
                    f"{place[0]}-{place[1]} has {starts[place]} to {ends[place]}: {offset} became {clamped[place]}",
                    highlight=False,
                )
        if not json:
            console.print(
                "done" if execute else "dry run: nothing was changed. Add --execute to do it.", highlight=False
            )


def partitions_of(topic: str, wanted: list[int] | None, count: int) -> list[tuple[str, int]]:
    """Raises UserError for a partition that isn't there."""
    for index in wanted or []:
        if not 0 <= index < count:
            raise UserError(f"{topic} has no partition {index}: it has 0 to {count - 1}.")
    return [(topic, index) for index in (wanted or range(count))]


def offsets_at(
    client: KafkaAdmin,
    to: str,
    places: list[tuple[str, int]],
    committed: dict[tuple[str, int], int],
    starts: dict[tuple[str, int], int],
    ends: dict[tuple[str, int], int],
) -> dict[tuple[str, int], int]:
    if to == "earliest":
        return starts
    if to == "latest":
        return ends
    if to[:1] in ("+", "-") and to[1:].isdecimal():
        return {place: committed.get(place, starts[place]) + int(to) for place in places}
    if to.isdecimal():
        return dict.fromkeys(places, int(to))
    return client.offsets_at(places, parse_time_ms(to, "earliest, latest, an offset, +N, -N, or "))


def parse_time_ms(text: str, others: str = "") -> int:
    """An ISO-8601 time, in UTC unless it says otherwise. Raises UserError, which names what else may be given."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} can't be used: give {others}a time as in 2026-01-31T08:00.") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


@app.command()
def delete(
    group: Group,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Forget a group that has no members, with its offsets."""
    with explained("groups delete"):
        client = admin(bootstrap_servers)
        if not yes and not typer.confirm(f"Forget {group} and its offsets?"):
            raise typer.Exit(1)
        client.delete_group(group)
        if json:
            show_json({"deleted": group})
        else:
            console.print(f"deleted {group}", highlight=False)

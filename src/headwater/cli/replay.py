"""`headwater replay`: a group handles the events of a range again."""

from typing import Annotated

import typer

from headwater.cli.groups import Group, offsets_at, partitions_of
from headwater.cli.output import DEFAULT_SERVERS, Json, Servers, UserError, admin, console, explained, show_rows
from headwater.kafka.admin import KafkaAdmin
from headwater.operations.replay import plan


def replay(
    group: Group,
    topic: Annotated[str, typer.Option(help="The topic whose events are handled again.")],
    start: Annotated[str, typer.Option("--from", help="earliest, an offset, or a time such as 2026-01-31T08:00.")],
    end: Annotated[
        str | None, typer.Option("--to", help="The same, not included; else up to where the group is.")
    ] = None,
    partition: Annotated[list[int] | None, typer.Option(help="Only these partitions; repeatable.")] = None,
    outside_effects: Annotated[
        bool, typer.Option("--outside-effects", help="Call handlers that act on the world outside as well.")
    ] = False,
    execute: Annotated[bool, typer.Option("--execute", help="Do it; without it the plan is shown.")] = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Handle events again, although the inbox knows them. Refused while the group has members."""
    with explained("replay"):
        client = admin(bootstrap_servers)
        places = _places(client, group, topic, partition)
        committed = {place: position for place, position in client.committed(group).items() if place in places}
        if not committed:
            raise UserError(f"{group} has handled nothing of {topic} yet: there is nothing to handle again.")
        lows, highs = client.start_offsets(places), client.end_offsets(places)

        def found(text: str) -> dict[tuple[str, int], int]:
            offsets = offsets_at(client, text, places, {}, lows, highs)
            return {place: min(max(offset, lows[place]), highs[place]) for place, offset in offsets.items()}

        begins, ends = found(start), found(end) if end is not None else None
        if ends is not None and all(ends[place] < begins[place] for place in places):
            raise UserError(f"--to {end} lies before --from {start}.")
        planned = plan(committed, begins, ends, outside_effects=outside_effects)
        if execute and planned:
            client.alter_committed(group, {(p.topic, p.partition): (p.start, p.metadata) for p in planned})
        rows = [(each.topic, each.partition, each.start, each.end, each.events, each.frontier) for each in planned]
        columns = ("topic", "partition", "from", "to", "events", "frontier")
        show_rows(
            columns, rows, json, numbers=columns[1:], empty="nothing that the group has handled lies in that range"
        )
        if json:
            return
        if not planned:
            return
        if not outside_effects:
            console.print(
                "handlers with outside effects stay silent; --outside-effects calls them too", highlight=False
            )
        console.print(
            "done: it begins when the application starts"
            if execute
            else "dry run: nothing was changed. Add --execute.",
            highlight=False,
        )


def _places(client: KafkaAdmin, group: str, topic: str, partition: list[int] | None) -> list[tuple[str, int]]:
    """Raises UserError."""
    counts = client.partition_counts()
    if topic not in counts:
        raise UserError(f"there is no topic {topic}.")
    if group not in client.group_states():
        raise UserError(f"there is no group {group}. `headwater groups list` shows those that are.")
    members = client.describe_group(group).members
    if members:
        raise UserError(f"the group {group} has {len(members)} members. Stop them first, then replay, then start them.")
    return partitions_of(topic, partition, counts[topic])

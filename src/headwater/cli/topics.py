"""`headwater topics`: list, describe, create, delete, alter."""

from typing import Annotated

import typer

from headwater.cli.output import (
    DEFAULT_SERVERS,
    Json,
    Servers,
    UserError,
    admin,
    console,
    explained,
    key_values,
    show_json,
    show_rows,
    show_table,
)

app = typer.Typer(no_args_is_help=True, help="Topics: list, describe, create, delete, alter.")


def topic_names(incomplete: str) -> list[str]:
    """Tab completion; silent when no broker answers."""
    try:
        return [name for name in admin(DEFAULT_SERVERS).topic_names() if name.startswith(incomplete)]
    except Exception:
        return []


Name = Annotated[str, typer.Argument(help="The topic.", autocompletion=topic_names)]
Configs = Annotated[list[str] | None, typer.Option("--config", help="NAME=VALUE, by Kafka's names; repeatable.")]


@app.command("list")
def list_topics(
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    internal: Annotated[bool, typer.Option(help="Kafka's own topics too.")] = False,
    json: Json = False,
) -> None:
    """All topics with their partitions and records."""
    with explained("topics list"):
        client = admin(bootstrap_servers)
        counts = client.partition_counts()
        names = sorted(name for name in counts if internal or not name.startswith("__"))
        places = [(name, index) for name in names for index in range(counts[name])]
        starts, ends = client.start_offsets(places), client.end_offsets(places)
        rows = [
            (name, counts[name], sum(ends[name, index] - starts[name, index] for index in range(counts[name])))
            for name in names
        ]
        show_rows(("topic", "partitions", "records"), rows, json, numbers=("partitions", "records"), empty="no topics")


@app.command()
def describe(name: Name, bootstrap_servers: Servers = DEFAULT_SERVERS, json: Json = False) -> None:
    """Partitions with their offsets and replicas, and the configs that are not the default."""
    with explained("topics describe"):
        client = admin(bootstrap_servers)
        topic = client.describe_topics([name])[0]
        places = [(name, each.partition) for each in topic.partitions]
        starts, ends = client.start_offsets(places), client.end_offsets(places)
        configs = {key: each.value for key, each in client.topic_configs(name).items() if not each.is_default}
        rows = [
            (
                each.partition,
                each.leader,
                ",".join(map(str, each.replicas)),
                ",".join(map(str, each.in_sync_replicas)),
                starts[name, each.partition],
                ends[name, each.partition],
            )
            for each in topic.partitions
        ]
        columns = ("partition", "leader", "replicas", "in sync", "start", "end")
        if json:
            partitions = [dict(zip((c.replace(" ", "_") for c in columns), row, strict=True)) for row in rows]
            show_json({"topic": name, "topic_id": topic.topic_id, "configs": configs, "partitions": partitions})
            return
        console.print(f"[bold]{name}[/]  id {topic.topic_id}", highlight=False)
        for key, value in configs.items():
            console.print(f"  {key}={value}", markup=False, highlight=False)
        show_table(columns, rows, numbers=("partition", "start", "end"))


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The topic.")],
    partitions: Annotated[int, typer.Option(help="-1: the broker's default.")] = -1,
    replication_factor: Annotated[int, typer.Option(help="-1: the broker's default.")] = -1,
    config: Configs = None,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Make a topic."""
    with explained("topics create"):
        created = admin(bootstrap_servers).create_topic(
            name, partitions, replication_factor, key_values(config or [], "--config")
        )
        if not created:
            raise UserError(f"the topic {name} exists already. `headwater topics alter` changes it.")
        if json:
            show_json({"created": name})
        else:
            console.print(f"created {name}", highlight=False)


@app.command()
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Delete a topic with all its records."""
    with explained("topics delete"):
        client = admin(bootstrap_servers)
        client.describe_topics([name])
        if not yes and not typer.confirm(f"Delete {name} and all its records?"):
            raise typer.Exit(1)
        client.delete_topic(name)
        if json:
            show_json({"deleted": name})
        else:
            console.print(f"deleted {name}", highlight=False)


@app.command()
def alter(
    name: Name,
    partitions: Annotated[int | None, typer.Option(help="More than now.")] = None,
    config: Configs = None,
    unset: Annotated[list[str] | None, typer.Option(help="A config that goes back to its default; repeatable.")] = None,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """More partitions, other configs."""
    with explained("topics alter"):
        changes: dict[str, str | None] = {**key_values(config or [], "--config"), **dict.fromkeys(unset or [])}
        if partitions is None and not changes:
            raise UserError("nothing to change: give --partitions, --config or --unset.")
        client = admin(bootstrap_servers)
        known = client.topic_configs(name)
        for key in unset or []:
            if key not in known:
                raise UserError(f"{name} has no config {key}. `headwater topics describe {name}` shows what is set.")
        if changes:
            client.alter_topic_configs(name, changes)
        if partitions is not None:
            client.grow_topic(name, partitions)
        if json:
            show_json({"altered": name, "partitions": partitions, "configs": changes})
        else:
            console.print(f"altered {name}", highlight=False)

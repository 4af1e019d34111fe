"""`headwater verify`: whether what an application did kept its promises."""

from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy.exc import SQLAlchemyError

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
)
from headwater.kafka.admin import KafkaAdmin
from headwater.operations.failures import topics_of
from headwater.testing.history import check, gather


def verify(
    folder: Annotated[str, typer.Argument(help="Where the application's HEADWATER_HISTORY is.")],
    group: Annotated[str, typer.Option(help="The group that is checked.")],
    topic: Annotated[str | None, typer.Option(help="Its topic; needed only where it has several.")] = None,
    effects: Annotated[
        str | None, typer.Option(help="URL#TABLE with event_id, key and serial: the effects of the handler.")
    ] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="The run is over: nothing beyond the frontier may be missing either.")
    ] = False,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """Check C1 to C9 of the failure contract. Exit code 1 and the first violation when one is broken."""
    with explained("verify"):
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}: run the application with HEADWATER_HISTORY={folder}.")
        client = admin(bootstrap_servers)
        topic = topic or _topic_of(client, group)
        if topic not in client.partition_counts():
            raise UserError(f"there is no topic {topic}.")
        database = None
        if effects is not None:
            url, separator, table = effects.rpartition("#")
            if not separator:
                raise UserError(f"--effects is URL#TABLE, as in sqlite:///shop.db#effects, not {effects!r}.")
            database = (url, table)
        try:
            evidence = gather(settings_for(bootstrap_servers), folder, group, topic, database)
        except SQLAlchemyError as error:
            said = str(error).split("\n")[0]
            raise UserError(f"the effects can't be read, a table with event_id, key and serial: {said}") from None
        if not evidence.lines:
            raise UserError(f"{folder} has no history of {group}: run the application with HEADWATER_HISTORY={folder}.")
        report = check(evidence, complete=complete)
        if json:
            show_json({"counts": dict(report.counts), "violations": [each._asdict() for each in report.violations]})
        else:
            console.print(
                ", ".join(f"{name} {count}" for name, count in sorted(report.counts.items())), highlight=False
            )
            if report.violations:
                console.print(f"[red]violated[/] {report.violations[0]}", soft_wrap=True, highlight=False)
                console.print(f"{len(report.violations)} violations in all: --json has them", highlight=False)
            else:
                unchecked = "" if database is not None else "; C5 was not checked: no --effects"
                console.print(f"[green]kept[/] C1 to C9 hold{unchecked}", highlight=False)
        if report.violations:
            raise typer.Exit(1)


def _topic_of(client: KafkaAdmin, group: str) -> str:
    """Raises UserError."""
    names = {topics.source for topics in topics_of(client, group)} or {topic for topic, _ in client.committed(group)}
    if len(names) != 1:
        raise UserError(f"{group} has {'no topic' if not names else ', '.join(sorted(names))}: name one with --topic.")
    return names.pop()

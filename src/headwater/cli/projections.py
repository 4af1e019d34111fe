"""`headwater projections`: how far read models are, what they wait for, and how they are built anew."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from sqlalchemy.exc import SQLAlchemyError

from headwater.cli.application import Target, with_database
from headwater.cli.output import Json, UserError, console, explained, show_json, show_rows
from headwater.domain.projection import Projection
from headwater.domain.rebuild import CannotRebuild, Rebuild
from headwater.kafka.admin import KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed
from headwater.kafka.registry_client import RegistryUnreachable
from headwater.runtime.app import App
from headwater.runtime.schemas import Schemas
from headwater.store import read_model, tables
from headwater.store.rows import Side

app = typer.Typer(no_args_is_help=True, help="Read models: list, rebuild, digest, skip.")

Name = Annotated[str, typer.Argument(help="The projection's name.")]


@app.command("list")
def list_projections(target: Target, json: Json = False) -> None:
    """How far each is, and what it waits for. Exit code 1 if one waits."""
    with explained("projections list"), _doors():
        found = with_database(target)
        rows = [_row(found, each) for each in _projections(found)]
        if json:
            show_json(rows)
        else:
            shown = ("name", "version", "events", "lag", "left out", "rebuild", "waits for")
            table = [
                (row["name"], row["version"], row["events"], row["lag"], len(row["skipped"]),
                 "begun" if row["rebuilding"] else "", "\n".join(map(_obstacle_text, row["waits_for"])))
                for row in rows
            ]  # fmt: skip
            show_rows(shown, table, False, numbers=("events", "lag", "left out"), empty="no projections")
        if any(row["waits_for"] for row in rows):
            raise typer.Exit(1)


def _row(app: App, projection: Projection) -> dict[str, Any]:
    with app.database.engine.connect() as connection:
        progress = read_model.load_progress(connection, projection.name, Side.LIVE)
        rebuilt = read_model.load_progress(connection, projection.name, Side.REBUILD)
    admin = KafkaAdmin(app.settings)
    counts = admin.partition_counts()
    places = [(topic.name, i) for topic in projection.topics for i in range(counts.get(topic.name, 0))]
    starts, ends = admin.start_offsets(places), admin.end_offsets(places)
    # what only its group knows: how far it has read where nothing was for it
    committed = {place: position.offset for place, position in admin.committed(projection.name).items()}
    lag = sum(
        max(0, end - max((progress.offset(*place) if progress else 0) or starts[place], committed.get(place, 0)))
        for place, end in ends.items()
    )
    return {
        "name": projection.name,
        "version": progress.version if progress is not None else None,
        "declared": projection.version,
        "generation": progress.generation if progress is not None else None,
        "events": progress.events if progress is not None else 0,
        "lag": lag,
        "rebuilding": rebuilt is not None,
        "skipped": [":".join(map(str, each)) for each in (progress.skipped if progress is not None else ())],
        "waits_for": _obstacles(projection, progress, starts) if progress is not None else [],
    }


def _obstacles(
    projection: Projection, progress: read_model.Progress, starts: dict[tuple[str, int], int]
) -> list[dict[str, Any]]:
    """What keeps it from going on, as the process that has it finds."""
    found = [
        {
            "event": f"{each.topic}:{each.partition}:{each.offset}",
            "reason": each.error,
            "attempts": each.attempts,
            "due_at_ms": each.due_ms,
        }
        for each in progress.stuck
    ]
    if progress.version != projection.version:
        reason = f"a rebuild: its rows are of version {progress.version}, and it is of version {projection.version}"
        found.append({"event": None, "reason": reason})
    read = {topic.name for topic in projection.topics if projection.events_of(topic)}
    for (topic, partition), start in starts.items():
        offset = progress.offset(topic, partition) or 0
        if topic in read and offset < start:
            reason = f"a rebuild: retention has taken {topic}-{partition} from {offset} to {start}"
            found.append({"event": None, "reason": reason})
    return found


def _obstacle_text(obstacle: dict[str, Any]) -> str:
    if obstacle["event"] is None:
        return str(obstacle["reason"])
    seconds = max(0.0, obstacle["due_at_ms"] / 1000 - time.time())
    attempts = f"{obstacle['attempts']} attempt{'s' if obstacle['attempts'] != 1 else ''}"
    return f"{obstacle['event']} {obstacle['reason']} ({attempts}, the next in {seconds:.0f} s)"


@app.command()
def rebuild(
    target: Target,
    name: Name,
    check: Annotated[bool, typer.Option("--check", help="Compare with what is there, and change nothing.")] = False,
    anew: Annotated[bool, typer.Option("--anew", help="Don't go on with a rebuild that was stopped.")] = False,
    allow_gap: Annotated[
        bool, typer.Option("--allow-gap", help="Build it from what is left, where retention has taken the beginning.")
    ] = False,
    json: Json = False,
) -> None:
    """Build a read model anew, beside the one that is read, and put it in its place. Exit code 1 if --check finds others."""
    with explained("projections rebuild"), _doors():
        found = with_database(target)
        projection = _projection(found, name)
        tables.create_tables(found.database.engine)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with ProgressBar(*columns, console=console, transient=True, disable=json) as bar:
            task = bar.add_task(name, total=None)
            made = Rebuild(
                projection, found.database, found.settings, Schemas(found.settings),
                lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
            result = made.run(check=check, anew=anew, allow_gap=allow_gap)
        if json:
            show_json({**result._asdict(), "live": _dicts(result.live), "rebuilt": _dicts(result.rebuilt),
                       "equal": result.is_equal if check else None})  # fmt: skip
        elif check:
            shown = [
                (live.table, live.rows, rebuilt.rows, "equal" if live == rebuilt else "different")
                for live, rebuilt in zip(result.live, result.rebuilt, strict=True)
            ]
            show_rows(("table", "rows", "rebuilt rows", "rows are"), shown, False, numbers=("rows", "rebuilt rows"))
        else:
            console.print(f"{name} is rebuilt of {result.events} events, in {result.seconds:.1f} s", highlight=False)
        if check and not result.is_equal:
            raise typer.Exit(1)


@app.command()
def digest(target: Target, name: Name, json: Json = False) -> None:
    """What the rows of its tables come to: the same for the same rows."""
    with explained("projections digest"), _doors():
        found = with_database(target)
        projection = _projection(found, name)
        with found.database.engine.connect() as connection, read_model.snapshot(connection):
            digests = [read_model.digest(connection, shape) for shape in projection.shapes(Side.LIVE)]
        show_rows(("table", "rows", "value"), digests, json, numbers=("rows",))


@app.command()
def skip(
    target: Target,
    name: Name,
    event: Annotated[str, typer.Argument(metavar="TOPIC:PARTITION:OFFSET", help="As `projections list` shows it.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also one that nothing waits for: applied or not, rebuilds leave it out.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Rebuilds apply it again; the rows stay as they are.")] = False,
    json: Json = False,
) -> None:
    """Leave out an event that can't be applied, now and in every rebuild."""
    with explained("projections skip"), _doors():
        found = with_database(target)
        projection = _projection(found, name)
        topic, partition, offset = _place(event)
        if topic not in {each.name for each in projection.topics}:
            raise UserError(f"{name} doesn't read {topic}.")
        with found.database.engine.begin() as connection:
            progress = read_model.load_progress(connection, name, Side.LIVE, lock=True)
            if progress is None:
                raise UserError(f"{name} has not begun: nothing is stuck.")
            place = (topic, partition, offset)
            if undo:
                if place not in progress.skipped:
                    raise UserError(f"{name} doesn't leave out {event}: `projections list --json` shows what it does.")
                left = tuple(each for each in progress.skipped if each != place)
                progress = msgspec.structs.replace(progress, skipped=left)
            else:
                waits = [f"{each.topic}:{each.partition}:{each.offset}" for each in progress.stuck]
                if event not in waits and not force:
                    raise UserError(
                        f"{name} doesn't wait for {event}, but for {', '.join(waits) or 'nothing'}. An event that was applied "
                        "stays applied, and every rebuild would leave it out: say --force if that is wanted."
                    )
                progress = progress.without(*place)
            read_model.save_progress(connection, name, Side.LIVE, progress)
        if json:
            show_json({"unskipped" if undo else "skipped": event})
        else:
            console.print(f"{name} {'applies' if undo else 'leaves out'} {event}", highlight=False)


def _place(event: str) -> tuple[str, int, int]:
    """Raises UserError."""
    try:
        topic, partition, offset = event.rsplit(":", 2)
        return topic, int(partition), int(offset)
    except ValueError:
        raise UserError(f"{event!r} names no event: TOPIC:PARTITION:OFFSET, as `projections list` shows it.") from None


def _dicts(digests: list[read_model.Digest]) -> list[dict[str, object]]:
    return [each._asdict() for each in digests]


def _projections(app: App) -> list[Projection]:
    return [each for each in app.beside if isinstance(each, Projection)]


def _projection(app: App, name: str) -> Projection:
    """Raises UserError."""
    for each in _projections(app):
        if each.name == name:
            return each
    names = ", ".join(each.name for each in _projections(app)) or "none"
    raise UserError(f"{app.name} has no projection {name!r}: {names}.")


@contextmanager
def _doors() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise UserError(f"the database refuses: {str(error).splitlines()[0]}") from None
    except (CannotRebuild, ConsumerFailed, RegistryUnreachable, msgspec.ValidationError) as error:
        raise UserError(str(error)) from None

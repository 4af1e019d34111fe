"""`headwater sagas`: where long processes are, which are stuck and why, and how they go on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
import typer
from sqlalchemy.exc import SQLAlchemyError

from headwater.cli.application import Target, with_database
from headwater.cli.output import Json, UserError, console, explained, show_json, show_rows
from headwater.domain.saga import Saga, SagaRow, StaleSaga, UnknownStep
from headwater.domain.saga_decision import Status
from headwater.kafka.registry_client import RegistryUnreachable
from headwater.runtime.app import App
from headwater.runtime.schemas import UnusableSchema
from headwater.runtime.subscription import CannotStart
from headwater.store.outbox import InvalidOutbox

app = typer.Typer(no_args_is_help=True, help="Sagas: list, show, resume.")

RESUME_TRIES = 5

Name = Annotated[str, typer.Argument(help="The saga's name.")]
Id = Annotated[str, typer.Argument(help="Which one: the value of its key.")]


@app.command("list")
def list_sagas(
    target: Target,
    status: Annotated[Status | None, typer.Option(help="Only those.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many of each saga.")] = 100,
    json: Json = False,
) -> None:
    """Where each saga is; those without news for longest first."""
    with explained("sagas list"), _database():
        found = with_database(target)
        rows = []
        with found.database.sessions() as session:
            for saga in _sagas(found):
                rows += [_row(saga, each) for each in saga.rows(session, status, limit)]
        columns = ("saga", "id", "status", "step", "reason")
        if json:
            show_json(rows)
        else:
            show_rows(columns, [tuple(row[column] for column in columns) for row in rows], False, empty="no sagas")


@app.command()
def show(target: Target, saga: Name, id: Id, json: Json = False) -> None:
    """One saga: where it is, why, and what it remembers."""
    with explained("sagas show"), _database():
        found = with_database(target)
        with found.database.sessions() as session:
            row = _found(_saga(found, saga).load(session, id), saga, id)
        shown = {**_row(_saga(found, saga), row), "state": msgspec.to_builtins(row.state)}
        if json:
            show_json(shown)
        else:
            for name, value in shown.items():
                console.print(f"{name}: {value}", highlight=False, markup=False)


@app.command()
def resume(
    target: Target,
    saga: Name,
    id: Id,
    as_compensated: Annotated[
        bool,
        typer.Option("--as-compensated", help="It was undone by hand: go on with the next, instead of asking again."),
    ] = False,
    json: Json = False,
) -> None:
    """Let a stuck saga go on: its compensation is sent again, and has its attempts anew."""
    with explained("sagas resume"), _database():
        found = with_database(target)
        one = _saga(found, saga)
        with found.database.sessions() as session:
            row = _found(one.load(session, id), saga, id)
        found.outbox.prepare(found.database.engine)
        found.prepare_schemas()
        for _ in range(RESUME_TRIES):
            try:
                with found.unit_of_work(found.database.sessions()) as uow:
                    if not one.resume(uow, id, is_compensated=as_compensated):
                        raise UserError(f"{saga} {id} is {row.record.status}, not stuck: it goes on by itself.")
                break
            except StaleSaga:
                time.sleep(0.1)
        else:
            raise UserError(f"{saga} {id} changes all the time: it is not stuck any more.")
        show_json({"resumed": True}) if json else console.print(f"{saga} {id} goes on", highlight=False)


def _row(saga: Saga, row: SagaRow) -> dict[str, Any]:
    record = row.record
    return {
        "saga": saga.name,
        "id": row.id,
        "status": record.status.value,
        "step": record.names[record.step],
        "reason": record.reason,
        "to_compensate": [record.names[i] for i in record.undo],
        "version": row.version,
    }


def _found(row: SagaRow | None, saga: str, id: str) -> SagaRow:
    if row is None:
        raise UserError(f"there is no {saga} of {id!r}.")
    return row


def _sagas(app: App) -> list[Saga]:
    return [each for each in app.joined if isinstance(each, Saga)]


def _saga(app: App, name: str) -> Saga:
    """Raises UserError."""
    names = [each.name for each in _sagas(app)]
    found = next((each for each in _sagas(app) if each.name == name), None)
    if found is None:
        raise UserError(f"{app.name} has no saga {name!r}: it has {', '.join(names) or 'none'}.")
    return found


@contextmanager
def _database() -> Iterator[None]:
    """Raises UserError."""
    try:
        yield
    except (CannotStart, InvalidOutbox, RegistryUnreachable, UnknownStep, UnusableSchema) as error:
        raise UserError(str(error)) from None
    except SQLAlchemyError as error:
        raise UserError(f"the database can't be used: {str(error).splitlines()[0]}") from None

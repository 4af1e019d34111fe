"""What every command prints: tables that fit the terminal, or JSON for programs; errors that say what to do next."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from headwater.declaration import WrongDeclaration
from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.consumer import KafkaException
from headwater.settings import DEFAULT_BOOTSTRAP_SERVERS, InvalidSetting, Settings, from_environment

WIDE = 1000  # for what is piped into a file or a program: a row is a line

CANNOT_BE = 2
"""The exit code for what no second start can help: an application that is not there, or is declared wrongly."""

console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
errors = Console(stderr=True)

Servers = Annotated[
    str,
    typer.Option(
        "--bootstrap-servers",
        envvar="HEADWATER_BOOTSTRAP_SERVERS",
        help="HOST:PORT of the cluster, several with commas.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_SERVERS = DEFAULT_BOOTSTRAP_SERVERS


def settings_for(servers: str) -> Settings:
    """The cluster that was named, with the client's properties of the environment. Raises InvalidSetting."""
    return replace(from_environment(os.environ), bootstrap_servers=servers)


def admin(servers: str) -> KafkaAdmin:
    """Raises NotReachable, InvalidSetting."""
    client = KafkaAdmin(settings_for(servers))
    client.check_reachable()
    return client


@contextmanager
def explained(command: str) -> Iterator[None]:
    """An error that a person can do something about is one message and exit code 1, never a traceback."""
    try:
        yield
    except (AdminError, InvalidSetting, UserError) as error:
        _say(command, str(error), getattr(error, "exit_code", 1))
    except WrongDeclaration as error:
        _say(command, str(error), CANNOT_BE)
    except KafkaException as error:
        _say(command, f"Kafka's client refuses: {error.args[0].str() if error.args else error}")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except (OSError, ValueError) as error:
        _say(command, f"{type(error).__name__}: {error}")


def _say(command: str, message: str, exit_code: int = 1) -> NoReturn:
    errors.print(f"headwater {command}: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(exit_code) from None


class UserError(Exception):
    """What was asked for can't be done; the message says what can."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def show_json(value: object) -> None:
    print(json.dumps(value, indent=2, default=str))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """Columns named in `numbers` are set to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    console.print(table, highlight=False)


def show_rows(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    as_json: bool,
    *,
    numbers: Sequence[str] = (),
    empty: str = "nothing",
) -> None:
    if as_json:
        show_json([dict(zip([name.replace(" ", "_") for name in columns], row, strict=True)) for row in rows])
    elif rows:
        show_table(columns, rows, numbers=numbers)
    else:
        console.print(empty, highlight=False)


def key_values(pairs: Sequence[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` options. Raises UserError."""
    values = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise UserError(f"{option} takes NAME=VALUE, not {pair!r}.")
        values[name] = value
    return values


def is_terminal() -> bool:
    return sys.stdout.isatty()

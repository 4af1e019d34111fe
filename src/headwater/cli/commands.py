"""All commands, by name; each has the module of its name. Only the one that is asked for is loaded: what applications need takes
half a second to import, and most commands don't need it."""

from importlib import import_module
from typing import Annotated

import typer

from headwater import __version__
from headwater.cli.broker import parser

NAMES = ("up", "run", "topics", "groups", "lag", "schemas", "outbox", "projections", "sagas", "audit", "dead-letters", "apply",
         "replay", "verify", "registry", "produce", "consume")  # fmt: skip


def command_line(wanted: str | None = None) -> typer.Typer:
    """wanted: the command alone; all of them where there is none of that name, for help and completion."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(headwater)
    for name in [wanted] if wanted in NAMES else NAMES:
        module = import_module(f"headwater.cli.{name.replace('-', '_')}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, name))
    if wanted not in NAMES:
        app.command("broker", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(broker)
    return app


def headwater(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda wanted: show_version(wanted))
    ] = False,
) -> None:
    """Headwater: the event backbone for Python teams."""


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"headwater {__version__}")
        raise typer.Exit


def broker() -> None:
    """The broker alone: `headwater broker --help`."""
    parser().print_help()  # the entry point runs it before this module is loaded

"""All commands, by group."""

from typing import Annotated

import typer

from headwater import __version__
from headwater.cli import (
    apply,
    audit,
    consume,
    dead_letters,
    groups,
    lag,
    outbox,
    produce,
    projections,
    registry,
    replay,
    run,
    sagas,
    schemas,
    topics,
    up,
    verify,
)
from headwater.cli.broker import parser

app = typer.Typer(
    no_args_is_help=True,
    help="Headwater: the event backbone for Python teams.",
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda wanted: show_version(wanted))
    ] = False,
) -> None:
    """Headwater: the event backbone for Python teams."""


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"headwater {__version__}")
        raise typer.Exit


app.add_typer(up.app, name="up")
app.command("run")(run.run)
app.add_typer(topics.app, name="topics")
app.add_typer(groups.app, name="groups")
app.add_typer(schemas.app, name="schemas")
app.add_typer(outbox.app, name="outbox")
app.add_typer(projections.app, name="projections")
app.add_typer(sagas.app, name="sagas")
app.add_typer(audit.app, name="audit")
app.add_typer(dead_letters.app, name="dead-letters")
app.command("lag")(lag.lag)
app.command("apply")(apply.apply)
app.command("replay")(replay.replay)
app.command("verify")(verify.verify)
app.command("registry")(registry.registry)
app.command("produce")(produce.produce)
app.command("consume")(consume.consume)


@app.command("broker", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def broker() -> None:
    """The broker alone: `headwater broker --help`."""
    parser().print_help()  # the entry point runs it before this module is loaded

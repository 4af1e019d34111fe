"""`headwater run`: one application's handlers, relay and web, until SIGTERM."""

import logging
from typing import Annotated

import typer

from headwater.cli.output import UserError, explained
from headwater.kafka.consumer import ConsumerFailed
from headwater.runtime.app import CannotStart
from headwater.runtime.handler import InvalidHandler
from headwater.runtime.lifecycle import load
from headwater.runtime.lifecycle import run as run_app
from headwater.runtime.publish import NoTopic


def run(
    target: Annotated[str, typer.Argument(metavar="MODULE:APP", help="The application, as in shop.inventory:app.")],
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run an application. The cluster is HEADWATER_BOOTSTRAP_SERVERS, the database HEADWATER_DATABASE_URL."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with explained("run"):
        try:
            run_app(load(target))
        except (CannotStart, InvalidHandler, NoTopic, ConsumerFailed) as error:
            raise UserError(str(error)) from None

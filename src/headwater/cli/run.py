"""`headwater run`: one application's handlers, relay and web, until SIGTERM."""

import json as json_library
import logging
from typing import Annotated

import typer
from sqlalchemy.exc import OperationalError

from headwater.cli.output import CANNOT_BE, UserError, explained
from headwater.declaration import WrongDeclaration
from headwater.kafka.consumer import ConsumerFailed, OutOfRange
from headwater.kafka.producer import NotPublished
from headwater.kafka.registry_client import RegistryUnreachable
from headwater.runtime.app import JobCutOff
from headwater.runtime.lifecycle import load
from headwater.runtime.lifecycle import run as run_app
from headwater.runtime.publish import NoTopic
from headwater.runtime.schemas import UnusableSchema
from headwater.runtime.subscription import CannotStart
from headwater.settings import InvalidSetting
from headwater.store.database import InvalidDatabase

LOG_LEVELS = ("debug", "info", "warning", "error")
EXPLAINED = (
    CannotStart,
    JobCutOff,
    RegistryUnreachable,
    UnusableSchema,
    ConsumerFailed,
    InvalidDatabase,
    InvalidSetting,
    NoTopic,
    NotPublished,
    OperationalError,
    OutOfRange,
    WrongDeclaration,
)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        line["message"] = record.getMessage() + (self.formatException(record.exc_info) if record.exc_info else "")
        return json_library.dumps(line)


def run(
    target: Annotated[str, typer.Argument(metavar="MODULE:APP", help="The application, as in shop.inventory:app.")],
    until_now: Annotated[
        bool,
        typer.Option("--until-now", help="A job: handle what the topics have at the start, then end with exit code 0."),
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    json: Annotated[bool, typer.Option("--json", help="Log JSON lines.")] = False,
) -> None:
    """Run an application. The cluster is HEADWATER_BOOTSTRAP_SERVERS, the database HEADWATER_DATABASE_URL. Exit code 1 when
    it can't start now, 2 when no start can help."""
    with explained("run"):
        if log_level not in LOG_LEVELS:
            raise UserError(f"--log-level is one of {', '.join(LOG_LEVELS)}, not {log_level!r}.")
        logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
        if json:
            logging.getLogger().handlers[0].setFormatter(JsonLines())
        try:
            app = load(target)
        except EXPLAINED as error:
            raise UserError(_shown(error), CANNOT_BE) from None
        try:
            run_app(app, until_now=until_now)
        except EXPLAINED as error:
            raise UserError(_shown(error)) from None


def _shown(error: Exception) -> str:
    return str(error).split("\n(Background")[0]

"""The application that a command is about: MODULE:APP, and its database."""

import os
from typing import Annotated

import typer

from headwater.cli.output import CANNOT_BE, UserError
from headwater.runtime.app import App
from headwater.runtime.lifecycle import load
from headwater.runtime.subscription import CannotStart

Target = Annotated[str, typer.Argument(metavar="MODULE:APP", help="The application, as in shop.orders:app.")]


def loaded(target: str) -> App:
    """Raises UserError, WrongDeclaration."""
    try:
        return load(target)
    except CannotStart as error:
        raise UserError(str(error), CANNOT_BE) from None


def with_database(target: str) -> App:
    """With a database that is there: looking must not make one. Raises UserError, WrongDeclaration."""
    found = loaded(target)
    try:
        database = found.database
    except CannotStart as error:
        raise UserError(str(error)) from None
    path = database.engine.url.database
    if database.kind == "sqlite" and path not in (None, "", ":memory:") and not os.path.exists(path):
        raise UserError(
            f"there is no database {path}: the application makes it when it starts. `headwater up` keeps one for each "
            "application in its data folder: HEADWATER_DATABASE_URL=sqlite:///headwater-data/NAME.db."
        )
    return found

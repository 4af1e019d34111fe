"""`headwater outbox`: what waits in an outbox, for how long, and who publishes it."""

import typer
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from headwater.cli.application import Target, with_database
from headwater.cli.output import Json, UserError, console, explained, show_json
from headwater.store.outbox import InvalidOutbox, NotMigrated

app = typer.Typer(no_args_is_help=True, help="The outbox: status, migration.")


@app.command()
def status(target: Target, json: Json = False) -> None:
    """How many rows wait, the oldest for how many seconds, and which processes relay. Exit code 1 if nobody does."""
    with explained("outbox status"):
        found = with_database(target)
        try:
            found.outbox.prepare(found.database.engine)
            with found.database.engine.connect() as connection:
                waiting, seconds = found.outbox.status(connection)
                relays = None
                if connection.dialect.name == "postgresql":
                    query = text("SELECT count(DISTINCT application_name) FROM pg_stat_activity WHERE datname = "
                                 "current_database() AND application_name LIKE 'headwater-relay-%'")  # fmt: skip
                    relays = int(connection.execute(query).scalar_one())
        except InvalidOutbox as error:
            raise UserError(str(error)) from None
        except SQLAlchemyError as error:
            raise UserError(f"the database can't be read: {str(error).splitlines()[0]}") from None
        if json:
            show_json({"table": found.outbox.name, "waiting": waiting, "oldest_seconds": seconds, "relays": relays})
        else:
            age = f", the oldest for {seconds:.1f} s" if seconds is not None else ""
            console.print(f"{found.outbox.name}: {waiting} rows wait{age}", highlight=False)
            if relays is not None:
                console.print(f"{relays} {'process relays' if relays == 1 else 'processes relay'}", highlight=False)
        if waiting and relays == 0:
            raise typer.Exit(1)


@app.command()
def migration(target: Target, json: Json = False) -> None:
    """The statements that an outbox table of one's own lacks; to run once, in the application's database."""
    with explained("outbox migration"):
        found = with_database(target)
        try:
            found.outbox.prepare(found.database.engine)
            statements: list[str] = []
        except NotMigrated:
            statements = found.outbox.migration()
        except InvalidOutbox as error:
            raise UserError(str(error)) from None
        if json:
            show_json(statements)
        else:
            print("\n".join(f"{statement};" for statement in statements) or "-- nothing is missing")

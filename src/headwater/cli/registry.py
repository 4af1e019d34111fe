"""`headwater registry`: the schema registry alone."""

import asyncio
import logging
import sys
from typing import Annotated

import typer

from headwater.cli.output import DEFAULT_SERVERS, Json, Servers, UserError, explained, settings_for

DEFAULT_LISTEN = "127.0.0.1:8081"


def registry(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address; port 0 takes a free one.")
    ] = DEFAULT_LISTEN,
    advertise: Annotated[
        str | None, typer.Option(metavar="URL", help="Where other registries reach this one, if not at --listen.")
    ] = None,
    bootstrap_servers: Servers = DEFAULT_SERVERS,
    json: Json = False,
) -> None:
    """The schema registry alone, until SIGTERM. It prints `ready http://HOST:PORT` when it answers."""
    with explained("registry"):
        logging.basicConfig(
            stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s"
        )
        host, separator, port = listen.rpartition(":")
        if not separator or not port.isdecimal() or int(port) > 65535:
            raise UserError(f"--listen takes HOST:PORT, not {listen!r}.")
        try:
            from headwater.registry.server import run
        except ModuleNotFoundError as error:
            raise UserError(f"it needs {error.name}: install headwater[registry].") from None
        from headwater.asgi import CannotListen
        from headwater.event_loop import new_event_loop
        from headwater.registry.storage import StoreFailed

        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(
                    run(
                        settings_for(bootstrap_servers),
                        host.strip("[]"),
                        int(port),
                        advertised=advertise.rstrip("/") if advertise is not None else None,
                        say_json=json,
                    )
                )
        except CannotListen as error:
            raise UserError(f"it can't listen at {error}.") from None
        except StoreFailed as error:
            raise UserError(f"`_schemas` can't be written: {error}") from None

"""An application as a process: run until SIGTERM, then stop cleanly; a second SIGTERM ends it at once."""

import asyncio
import importlib
import os
import signal
import sys

from headwater.event_loop import new_event_loop
from headwater.runtime.app import App
from headwater.runtime.subscription import CannotStart


def load(target: str) -> App:
    """The App that `module:name` names. Raises CannotStart."""
    module_name, separator, name = target.partition(":")
    if not separator:
        raise CannotStart(f"{target!r} names no application: write MODULE:NAME, as in shop.inventory:app.")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise CannotStart(f"there is no module {error.name}: start from the folder that it lies in.") from None
        raise
    app = getattr(module, name, None)
    if not isinstance(app, App):
        raise CannotStart(f"{module_name} has no App named {name!r}.")
    return app


def run(app: App, *, until_now: bool = False) -> None:
    """The whole life of an application's process. Raises CannotStart, AdminError."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_run(app, until_now=until_now))


async def _run(app: App, *, until_now: bool) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def asked() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
    await app.run(stop, until_now=until_now)

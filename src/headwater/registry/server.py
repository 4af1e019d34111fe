"""The registry as a process: it says `ready http://HOST:PORT` when it has read all of `_schemas`, and runs until SIGTERM."""

import asyncio
import json
import signal

from headwater.asgi import BACKLOG, bind, serve
from headwater.registry.http import create_app
from headwater.registry.service import RegistryService
from headwater.settings import Settings


async def run(
    settings: Settings, host: str, port: int, *, advertised: str | None = None, say_json: bool = False
) -> None:
    """advertised: the address that other registries reach this one at. Raises CannotListen, AdminError, StoreFailed."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listener = bind(host, port)
    name, number_bound = listener.getsockname()[:2]
    address = f"http://[{name}]:{number_bound}" if ":" in name else f"http://{name}:{number_bound}"
    service = RegistryService(settings, advertised or address)
    starting = asyncio.create_task(service.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            listener.listen(BACKLOG)  # who connects after `ready` waits a moment at most
            print(json.dumps({"ready": address}) if say_json else f"ready {address}", flush=True)
            await serve(create_app(service), listener, stop)
    finally:
        starting.cancel()
        stopping.cancel()
        await service.stop()
        listener.close()

"""An application running inside a test: in a thread with its own event loop, stopped as by SIGTERM."""

import asyncio
import threading
from types import TracebackType
from typing import Self

from headwater import App, Settings
from tests.conftest import Engine

# Short sessions, so that a member that is gone is noticed within a test's patience.
CLIENT = {"session.timeout.ms": "6000", "heartbeat.interval.ms": "300", "metadata.max.age.ms": "2000"}


def settings_for(engine: Engine, database_url: str | None = None) -> Settings:
    return Settings(engine.bootstrap_servers, database_url, kafka=CLIENT)


class Running:
    """`with Running(app): ...` runs it until the block ends."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._loop = asyncio.new_event_loop()
        self._stop: asyncio.Event | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error: BaseException | None = None

    def _run(self) -> None:
        async def main() -> None:
            self._stop = asyncio.Event()
            self._started.set()
            await self._app.run(self._stop)

        try:
            self._loop.run_until_complete(main())
        except BaseException as error:
            self.error = error
        finally:
            self._loop.close()

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def stop(self) -> None:
        if self._thread.is_alive() and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the application did not stop"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self.error is not None and error is None:
            raise self.error

"""Threads for sync handlers that don't keep a process from ending.

`concurrent.futures` waits at exit for every thread that it has ever started; a handler that takes an hour would keep a
stopped application alive for as long. These threads are daemons: an event that is cut off is not settled, and is
handled again.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonExecutor(Executor):
    def __init__(self, threads: int, name: str) -> None:
        self._most = threads
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        """Threads without work, less the work that no thread has taken yet."""
        self._lock = threading.Lock()

    def submit(self, function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> "Future[T]":
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments, **named))
                except StopIteration as error:  # asyncio's futures don't take it
                    future.set_exception(RuntimeError(f"StopIteration was raised: {error}"))
                except BaseException as error:
                    future.set_exception(error)

        self._work.put(run)
        with self._lock:
            self._idle -= 1  # one of them will take it
            if self._idle < 0 and len(self._threads) < self._most:
                thread = threading.Thread(target=self._serve, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            self._work.get()()

"""The application under faults: a process of its own, which can be told where a fault is to strike it.

    python -m tests.faults.application GROUP TOPIC DELIVERY

On standard input: `arm POINT FAULT COUNT SERIAL`: when POINT is reached for the COUNTth time from now with work in flight,
the fault strikes: `kill` and `stop` are done here, by signals to itself; for the others it says `hit POINT SERIAL` and goes on a
moment later, when its parent has done its part. Each event writes one effect, with a serial, under effectively_once.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from dataclasses import replace

from sqlalchemy import text

from headwater import App, Envelope, Event, Retry, Topic, UnitOfWork
from headwater.runtime import crash_point
from headwater.runtime.lifecycle import run
from headwater.settings import from_environment

EFFECTS = "effects"
POISON_EVERY = 101
FLAKY_EVERY = 11
LATE_EVERY = 29
"""Fails for as long as a process lives that has not tried it three times: it is parked, and retried."""


class Moved(Event):
    account: str
    number: int


def topic_for(name: str) -> Topic:
    return Topic(name, key="account", events=[Moved], partitions=3)


class Faults:
    def __init__(self) -> None:
        self.point, self.fault, self.left, self.serial = "", "", 0, "0"
        self.tries: dict[int, int] = {}

    def listen(self) -> None:
        for line in sys.stdin:
            words = line.split()
            if words and words[0] == "arm":
                self.fault, self.left, self.serial = words[2], int(words[3]), words[4]
                self.point = words[1]
        os._exit(0)  # the parent is gone

    def reached(self, point: str) -> None:
        if point != self.point:
            return
        self.left -= 1
        if self.left > 0:
            return
        self.point = ""
        os.write(1, f"hit {point} {self.serial}\n".encode())
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(0.15)  # the fault happens while this is half done

    def trouble(self, number: int) -> None:
        """Raises for what is to fail."""
        if number % POISON_EVERY == POISON_EVERY - 1:
            raise ZeroDivisionError(f"{number} is poison")
        tries = self.tries[number] = self.tries.get(number, 0) + 1
        if number % LATE_EVERY == 0 and tries <= 5:
            raise RuntimeError(f"{number} is late")
        if number % FLAKY_EVERY == 0 and tries <= 1:
            raise RuntimeError(f"{number} is flaky")


def make(group: str, name: str, delivery: str, faults: Faults) -> App:
    settings = from_environment(os.environ)
    settings = replace(settings, kafka={**settings.kafka, "heartbeat.interval.ms": "200"})
    app = App(group, settings=settings)
    options = {"group": group, "delivery": delivery, "retry": Retry(50, "100ms..400ms"), "poison": [ZeroDivisionError]}
    if delivery == "effectively_once":

        @app.handler(topic_for(name), **options)
        async def handle(event: Moved, uow: UnitOfWork, envelope: Envelope) -> None:
            await asyncio.sleep(0.001)
            faults.trouble(event.number)
            values = {"id": envelope.event_id, "key": event.account, "number": event.number}
            await uow.async_session.execute(
                text(f"INSERT INTO {EFFECTS} (event_id, key, number) VALUES (:id, :key, :number)"), values
            )
    else:

        @app.handler(topic_for(name), **options)
        async def handle_plain(event: Moved) -> None:
            await asyncio.sleep(0.001)
            faults.trouble(event.number)

    return app


def main() -> None:
    group, name, delivery = sys.argv[1:4]
    faults = Faults()
    crash_point.hook = faults.reached
    threading.Thread(target=faults.listen, daemon=True).start()
    run(make(group, name, delivery, faults))


if __name__ == "__main__":
    main()

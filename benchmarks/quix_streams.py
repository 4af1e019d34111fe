"""Quix Streams' loop, for the benchmark: run by an interpreter of its own, as it asks for another confluent-kafka.

python quix_streams.py BOOTSTRAP_SERVERS TOPIC GROUP EVENTS      prints events a second, first event to last
"""

import subprocess
import sys
import time
from pathlib import Path

VERSION = "3.28.1"


def interpreter(cache: Path) -> Path:
    """Of a virtual environment that has it, made when it is missing."""
    home = cache / f"quixstreams-{VERSION}"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", f"quixstreams=={VERSION}"], check=True)
        (home / "ready").touch()
    return python


def rate(cache: Path, servers: str, topic: str, group: str, events: int) -> float:
    command = [str(interpreter(cache)), __file__, servers, topic, group, str(events)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout.split()[-1])


def main() -> None:
    from quixstreams import Application

    servers, topic, group, wanted = sys.argv[1:5]
    application = Application(servers, consumer_group=group, auto_offset_reset="earliest", loglevel=None)
    moments: list[float] = []
    seen = 0

    def handle(value: dict[str, object]) -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            moments.append(time.perf_counter())
        if seen == int(wanted):
            moments.append(time.perf_counter())
            application.stop()

    frame = application.dataframe(application.topic(topic, value_deserializer="json"))
    frame.update(handle)
    application.run(frame)
    print(int(wanted) / (moments[1] - moments[0]))


if __name__ == "__main__":
    main()

"""The history of a run: what an application did with each event, for the checker (`headwater verify`).

On by HEADWATER_HISTORY=DIR: each process appends JSON lines to a file of its own. A line is in the operating system's
hands before the process goes on, so that it survives kill -9 as the acknowledged records do.

    {"e": "ok", "t": 1700000000000, "g": "inventory", "p": 3, "a": token, "o": 17, "n": 1}

`e` is assign, load (it was found parked at the takeover), revoke, start, ok, skip, fail, park, done, dead or commit;
park, done, dead and commit are acknowledgements. `o` is the source offset, of `commit` and `assign` the committed one;
`n` the attempt, of `assign` the most there are; `r` is 1 for what was redriven. `assign` has the topic's id as `i`, and
whether a key is held when an event of it is given up on.
"""

import json
import os
import time
import uuid
from pathlib import Path


class History:
    def __init__(self, folder: str) -> None:
        """Raises OSError."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, event: str, group: str, partition: int, token: int, **fields: object) -> None:
        """From any thread: an append of one line is whole."""
        line = {"e": event, "t": time.time_ns() // 1_000_000, "g": group, "p": partition, "a": token, **fields}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)

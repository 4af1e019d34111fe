"""The entry point of `headwater`."""

import os
import signal
import sys


def main() -> None:
    # Until the process handles it itself: a stop during the start is a clean stop, nothing was begun.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    arguments = sys.argv[1:]
    if arguments[:1] == ["broker"]:  # before the command line's libraries are loaded
        from headwater.cli.broker import main as broker

        sys.exit(broker(arguments[1:]))
    from headwater.cli.commands import command_line

    command_line(arguments[0] if arguments else None)()

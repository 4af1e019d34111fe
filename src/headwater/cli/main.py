"""The entry point of `headwater`."""

import sys


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["broker"]:  # before the command line's libraries are loaded
        from headwater.cli.broker import main as broker

        sys.exit(broker(arguments[1:]))
    from headwater.cli.commands import app

    app()

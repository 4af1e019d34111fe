"""`headwater broker`: the broker alone.

This file is loaded without the command line's libraries, so that a broker starts in a fraction of a second.
"""

import argparse
import logging
import sys
from pathlib import Path

DEFAULT_LISTEN = "127.0.0.1:9092"


def main(arguments: list[str]) -> int:
    """The exit code: 0 after a clean stop, 1 when it can't start, 2 for a wrong command line."""
    from headwater.broker.broker_config import BrokerConfig, parse_setting, read_config_file
    from headwater.broker.log.log_directory import DirectoryError
    from headwater.broker.server import BrokerOptions, CannotListen, run
    from headwater.broker.topic_config import InvalidConfig

    options = parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        values = read_config_file(options.config) if options.config else {}
        values.update(parse_setting(text) for text in options.set)
        host, port = parse_address(options.listen)
        run(BrokerOptions(Path(options.data), host, port, BrokerConfig(values), say_json=options.json))
    except (InvalidConfig, DirectoryError, CannotListen) as error:
        print(f"headwater broker: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"headwater broker: {error.filename or options.data}: {error.strerror or error}.\n"
            "  The data directory must be readable, writable and not full.",
            file=sys.stderr,
        )
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwater broker",
        description="Run one broker until SIGTERM. It prints `ready HOST:PORT` when it answers.",
    )
    parser.add_argument("--data", metavar="DIR", default="./headwater-data/broker", help="data directory (%(default)s)")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", default=DEFAULT_LISTEN, help="address; port 0 takes a free one (%(default)s)"
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="a file of Kafka's server.properties names")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="one config, over the file's")
    parser.add_argument("--json", action="store_true", help='say {"ready": "HOST:PORT"} instead')
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="warning",
        help="log to stderr (%(default)s)",
    )
    return parser


def parse_address(text: str) -> tuple[str, int]:
    """Raises InvalidConfig."""
    from headwater.broker.topic_config import InvalidConfig

    host, separator, port = text.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise InvalidConfig(f"--listen takes HOST:PORT, not {text!r}.")
    return host.strip("[]") or "0.0.0.0", int(port)

"""`make bench`: everything, or `python -m benchmarks broker|app` for one part."""

import sys

from benchmarks import app, broker

PARTS = {"broker": broker.run, "app": app.run}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()

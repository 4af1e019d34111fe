"""`make bench`: everything, or `python -m benchmarks broker|app|delivery` for one part."""

import sys

from benchmarks import app, broker, delivery

PARTS = {"broker": broker.run, "app": app.run, "delivery": delivery.run}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()

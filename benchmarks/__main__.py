"""`make bench`: everything, or `python -m benchmarks broker|app|delivery|registry|formats|outbox|projections` for one part."""

import sys

from benchmarks import app, broker, delivery, formats, outbox, projections, registry

PARTS = {
    "broker": broker.run,
    "app": app.run,
    "delivery": delivery.run,
    "registry": registry.run,
    "formats": formats.run,
    "outbox": outbox.run,
    "projections": projections.run,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()

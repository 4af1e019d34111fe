"""`make bench`: everything, or `python -m benchmarks broker|app|delivery|registry|formats|projections` for one part."""

import sys

from benchmarks import app, broker, delivery, formats, projections, registry

PARTS = {
    "broker": broker.run,
    "app": app.run,
    "delivery": delivery.run,
    "registry": registry.run,
    "formats": formats.run,
    "projections": projections.run,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()

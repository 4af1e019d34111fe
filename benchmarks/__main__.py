"""`make bench`: everything, or `python -m benchmarks NAME` for one of PARTS."""

import sys

from benchmarks import app, broker, delivery, formats, orders, outbox, projections, registry

PARTS = {
    "broker": broker.run,
    "app": app.run,
    "delivery": delivery.run,
    "registry": registry.run,
    "formats": formats.run,
    "orders": orders.run,
    "outbox": outbox.run,
    "projections": projections.run,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()

"""The audit: every event of the shop once more, chained, for seven years. `headwater audit verify audit.events.trail`."""

from examples.shop.domain import AUDIT, CATALOGUE, cancellations, reserved, reviews
from headwater import App, Audit

app = App("audit-service")
trail = Audit("audit", topic=AUDIT, of=[*CATALOGUE, reserved, cancellations, reviews], partitions=4, retention="7y")
trail.join(app)

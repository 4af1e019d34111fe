"""Named places in the code where a fault is most likely to break a promise; tests put a hook here.

after_effect        the handler has returned, nothing is settled yet
before_park_ack     a parked record was sent
after_park_ack      it is acknowledged
before_done_ack, after_done_ack, before_dead_ack, after_dead_ack
                    the same of a done record, and of a dead letter
before_commit       the frontier is about to be committed
after_commit        it is committed
in_handler          the handler is about to be called
audit_sent, audit_acknowledged, audit_committed
                    records of an audit were sent, are acknowledged, are committed: see headwater.trust.auditor
"""

from collections.abc import Callable

NAMES = (
    "in_handler",
    "after_effect",
    "before_park_ack",
    "after_park_ack",
    "before_done_ack",
    "after_done_ack",
    "before_dead_ack",
    "after_dead_ack",
    "before_commit",
    "after_commit",
)

hook: Callable[[str], None] | None = None


def reached(name: str) -> None:
    if hook is not None:
        hook(name)

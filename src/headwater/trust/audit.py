"""Audit: a copy of every event of some topics, each exactly once, in a chain that shows what was changed.

    trail = Audit("audit", topic="audit.events.trail", of=[users, orders, payments], partitions=4, retention="7y")
    trail.join(app)

`headwater audit verify` reads the chain, and the events that are still there, with code of its own.

Promise    Every event of the topics has one record in the audit topic, whatever dies when, in the order of its partition. A
           record that is changed, removed, moved or put in later is found; so is an event that is changed afterwards.
Not        A chain that is cut off, at its end or at its beginning, as retention does: the verifier says where it begins, and
           a head that was kept elsewhere (`headwater audit head`) shows where it went. Whoever may write the audit topic may
           go on with the chain: give nobody else the right to.
Needs      Nothing but Kafka. Without transactions (the embedded broker has none yet) a process that was suspended just while it
           wrote may leave a copy too many when it wakes; it is no part of the chain, and the verifier counts it apart.
Proof      tests/trust/test_audit.py
"""

from collections.abc import Mapping, Sequence

from headwater.declaration import WrongDeclaration
from headwater.event.event import Event
from headwater.event.topic import Topic
from headwater.kafka.admin import KafkaAdmin
from headwater.runtime.app import App
from headwater.runtime.retry_topic import HEADER_ROOM
from headwater.runtime.subscription import CannotStart, Runner, Surroundings
from headwater.runtime.topics import DEFAULT_MAX_MESSAGE_BYTES


class InvalidAudit(WrongDeclaration, ValueError):
    """A declaration that can't work; the message says what to change."""


class AuditRecord(Event):
    """The audit topic's records are copies of other events: this stands for them where a topic is declared."""

    source: str


class Audit:
    def __init__(
        self,
        name: str,
        *,
        topic: str,
        of: Sequence[Topic],
        partitions: int = 1,
        retention: str | None = None,
        copies: bool = True,
    ) -> None:
        """name: of the group that shows how far it is. partitions: of the audit topic, a chain each; their number stays.
        retention: at least 90 days, which is what it is when None. copies: False keeps the digests of events alone. Raises
        InvalidAudit, InvalidTopic."""
        if not of:
            raise InvalidAudit(f"the audit {name} is of no topics.")
        if not all(isinstance(each, Topic) for each in of):
            raise InvalidAudit(f"the audit {name} is of Topics, as the App has them: {of!r}.")
        if topic in [each.name for each in of]:
            raise InvalidAudit(f"{topic} can't be the audit of itself.")
        self.name = name
        self.largest_bytes = max(int(each.configs.get("max.message.bytes", DEFAULT_MAX_MESSAGE_BYTES)) for each in of)
        """What is larger is not copied: its digest alone is kept."""
        self.topic = Topic(
            topic, key="source", events=[AuditRecord], partitions=partitions, retention=retention, class_="audit",
            configs={"max.message.bytes": str(self.largest_bytes + HEADER_ROOM)},
        )  # fmt: skip
        self.of = tuple(of)
        self.copies = copies
        self.needs_database = False

    @property
    def topics(self) -> Sequence[Topic]:
        return [self.topic, *self.of]

    def join(self, app: App) -> None:
        """Write it in this application; several processes share the chains. Raises InvalidHandler where its name is taken."""
        app.run_beside(self)

    def begin(self, around: Surroundings, topic_ids: Mapping[str, str]) -> Runner:
        """See `headwater.runtime.subscription.Beside`. Raises CannotStart, AdminError."""
        from headwater.trust.auditor import Auditor

        count = KafkaAdmin(around.settings).partition_counts()[self.topic.name]
        if count != self.topic.partitions:
            raise CannotStart(
                f"the audit topic {self.topic.name} has {count} partitions, and {self.topic.partitions} are declared: each is "
                "a chain, and their number stays. Declare as many as there are, or give the audit another topic."
            )
        auditor = Auditor(self, around)
        auditor.start()
        return auditor

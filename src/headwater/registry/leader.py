"""Which of several registries writes: the one that the group `schema-registry` gives the only partition of `_schemas`.

The writer commits how far it has applied the topic, for the tools that show lag: nothing begins there.

Each member's client id is the address that others reach it at, so those that don't write know where to send what they are
asked. A member that can't reach the cluster loses the partition with its session, and says so itself.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from headwater.kafka.admin import AdminError, KafkaAdmin
from headwater.kafka.consumer import ConsumerFailed, KafkaConsumer, TopicPartition
from headwater.settings import Settings

logger = logging.getLogger(__name__)

GROUP = "schema-registry"
TURN_SECONDS = 0.2
TROUBLE_SECONDS = 1.0
UNSURE_SECONDS = 2.0
"""Without a word from the group for this long, it may have gone on without us: a third of the session's time-out."""


class Leadership:
    def __init__(
        self, settings: Settings, topic: str, address: str, changed: Callable[[bool], None], applied: Callable[[], int]
    ) -> None:
        """address: of this registry. changed: told, in the thread, when it begins and when it ends. applied: the offset
        behind what it has applied."""
        kafka = {"session.timeout.ms": "6000", "heartbeat.interval.ms": "500", **settings.kafka, "client.id": address}
        self._settings = replace(settings, kafka=kafka)
        self._topic = topic
        self._changed = changed
        self._applied = applied
        self._leads = False
        self._shown = -1
        """What was committed last."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leadership", daemon=True)
        self._admin: KafkaAdmin | None = None
        self._turned = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(10.0)

    @property
    def is_sure(self) -> bool:
        """Not after a pause in which the group may have gone on without this member: a suspended process, say."""
        return time.monotonic() - self._turned < UNSURE_SECONDS

    def address_of_leader(self) -> str | None:
        """Asks the cluster. None while there is none. Raises AdminError."""
        self._admin = self._admin or KafkaAdmin(self._settings)
        members = self._admin.describe_group(GROUP).members
        return next((member.client_id for member in members if member.partitions), None)

    def _run(self) -> None:
        consumer = KafkaConsumer(self._settings, GROUP, "classic")

        def assigned(places: list[TopicPartition]) -> None:
            consumer.begin_at_committed(places, self._stopping.is_set)
            if places:
                self._tell(True)

        def gone(places: list[TopicPartition]) -> None:
            if places:
                self._tell(False)

        def refused(places: list[TopicPartition]) -> None:
            self._shown = -1

        consumer.on_refused = refused
        consumer.subscribe([self._topic], assigned, gone, gone)
        while not self._stopping.is_set():
            try:
                consumer.poll_paused(TURN_SECONDS)
                self._turned = time.monotonic()
                if self._leads and not consumer.commits_under_way:
                    self._show(consumer, self._applied())
            except (ConsumerFailed, AdminError) as error:
                logger.warning("leadership_unknown error=%s", error)
                self._stopping.wait(TROUBLE_SECONDS)
        self._tell(False)
        consumer.close()

    def _show(self, consumer: KafkaConsumer, applied: int) -> None:
        if applied != self._shown:
            consumer.commit_soon([TopicPartition(self._topic, 0, applied)])
            self._shown = applied

    def _tell(self, leads: bool) -> None:
        self._leads = leads
        self._changed(leads)

"""What can be searched, in OpenSearch: practitioners, and their slots, free or not.

A slot's document has the version of the event that made it, an offset, which grows with each event of its practitioner: an older
one that comes again is refused by OpenSearch itself (external versions).
"""

import contextlib
import logging
import os
from datetime import date
from typing import Any

from opensearchpy import OpenSearch
from opensearchpy.exceptions import ConflictError, NotFoundError

from examples.booking.domain import Schedule, slot_id

PRACTITIONERS, SLOTS = "practitioners", "slots"
MOST = 1000
SCHEDULED, REBUILT, FIRST_EVENT = 0, 1, 2
"""Versions: of a slot that nobody has booked yet, of one from the states, of one from the event at offset 0."""


class Index:
    def __init__(self) -> None:
        url = os.environ.get("BOOKING_OPENSEARCH_URL", "http://127.0.0.1:9200")
        self.client = OpenSearch(url, timeout=30, max_retries=3, retry_on_timeout=True, pool_maxsize=100)
        logging.getLogger("opensearch").setLevel(logging.ERROR)  # that a version is refused is no news

    def put_practitioner(self, id: str, name: str, specialty: str, days: list[Schedule]) -> None:
        self.client.index(index=PRACTITIONERS, id=id, body={"name": name, "specialty": specialty})
        for each in days:
            for slot in range(each.slots):
                self.put_slot(id, each.day, slot, True, SCHEDULED, "")

    def put_slot(self, practitioner_id: str, day: date, slot: int, is_free: bool, version: int, event_id: str) -> None:
        """event_id: of the event that says so."""
        id = slot_id(practitioner_id, day, slot)
        body = {
            "practitioner": practitioner_id,
            "day": day.isoformat(),
            "slot": slot,
            "free": is_free,
            "event": event_id,
        }
        # of versions that are equal the later counts: the same event again, or the next state of a slot
        kind = "external" if version == SCHEDULED else "external_gte"
        with contextlib.suppress(ConflictError):  # a newer event is there
            self.client.index(index=SLOTS, id=id, body=body, params={"version": version, "version_type": kind})

    def find(self, specialty: str, day: str) -> list[dict[str, Any]]:
        """Free slots of that day."""
        try:
            self.client.indices.refresh(index=f"{PRACTITIONERS},{SLOTS}")
            found = self.client.search(
                index=PRACTITIONERS, body={"query": {"match": {"specialty": specialty}}, "size": MOST}
            )
            names = {hit["_id"]: hit["_source"]["name"] for hit in found["hits"]["hits"]}
            wanted = [
                {"terms": {"practitioner.keyword": list(names)}},
                {"term": {"day": day}},
                {"term": {"free": True}},
            ]
            slots = self.client.search(index=SLOTS, body={"query": {"bool": {"filter": wanted}}, "size": MOST})
        except NotFoundError:
            return []
        rows = [hit["_source"] for hit in slots["hits"]["hits"]]
        return sorted(
            ({**row, "name": names[row["practitioner"]]} for row in rows),
            key=lambda row: (row["practitioner"], row["slot"]),
        )

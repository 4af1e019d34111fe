"""Upcasting: what an older version of an event said, in the words of the newest.

    def add_currency(data):
        return {**data, "currency": "EUR"}

    class OrderCreated(Event):
        event_version = "v3"
        upcasts = {"v1": add_currency, "v2": split_name}       # oldest first; the last one leads to event_version

Each takes the data as the version before had it on the wire (camelCase names) and gives it as the next one has it. Handlers
see the newest only. Without an upcast, data of another version is read as it is: that does where fields came with defaults
or went.
"""

from collections.abc import Callable, Mapping
from typing import Any

Upcast = Callable[[dict[str, Any]], dict[str, Any]]
Upcasts = Mapping[str, Upcast]
"""By the version that each begins with."""


def upcasts_from(version: str, upcasts: Upcasts) -> list[Upcast]:
    """Those that lead from that version to the newest; none when it is the newest, or nothing is known of it."""
    versions = list(upcasts)
    return [upcasts[each] for each in versions[versions.index(version) :]] if version in upcasts else []


def upcast(data: dict[str, Any], version: str, upcasts: Upcasts) -> dict[str, Any]:
    for each in upcasts_from(version, upcasts):
        data = each(data)
    return data

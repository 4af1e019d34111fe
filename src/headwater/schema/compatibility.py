"""Compatibility levels: which of a subject's versions a new schema is compared with, and which one must read which."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from headwater.schema.schema import Difference, Parsed, Schema


class Level(StrEnum):
    NONE = "NONE"
    BACKWARD = "BACKWARD"
    BACKWARD_TRANSITIVE = "BACKWARD_TRANSITIVE"
    FORWARD = "FORWARD"
    FORWARD_TRANSITIVE = "FORWARD_TRANSITIVE"
    FULL = "FULL"
    FULL_TRANSITIVE = "FULL_TRANSITIVE"

    @property
    def is_transitive(self) -> bool:
        return self.endswith("_TRANSITIVE")

    @property
    def new_reads_old(self) -> bool:
        return self.startswith(("BACKWARD", "FULL"))

    @property
    def old_reads_new(self) -> bool:
        return self.startswith(("FORWARD", "FULL"))


class Earlier:
    """A version that was registered before, newest first in all lists."""

    def __init__(self, version: int, schema: Schema) -> None:
        self.version = version
        self.schema = schema


def differences(
    level: Level, new: Schema, earlier: Sequence[Earlier], parse: Callable[[Schema], Parsed | Any]
) -> list[str]:
    """What stands against the new schema, as Confluent words it; empty when nothing does."""
    if level is Level.NONE:
        return []
    parsed = parse(new)
    for before in earlier if level.is_transitive else earlier[:1]:
        if before.schema.type is not new.type:
            return [f"{{oldSchemaVersion: {before.version}}}", "Incompatible because of different schema type"]
        old = parse(before.schema)
        found: list[Difference] = []
        if level.new_reads_old:
            found += parsed.differences(old)
        if level.old_reads_new:
            found += old.differences(parsed)
        if found:
            return [
                *(str(difference) for difference in found),
                f"{{oldSchemaVersion: {before.version}}}",
                f"{{oldSchema: '{before.schema.text}'}}",
                f"{{compatibility: '{level}'}}",
            ]
    return []

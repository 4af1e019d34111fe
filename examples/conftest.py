"""The examples are tested with the project's own engines."""

from tests.conftest import (
    broker,
    database_url,
    embedded,
    engine,
    evidence,
    kafka,
    kafka3,
    postgres,
    pytest_collection_modifyitems,
    unique,
)

__all__ = [
    "broker",
    "database_url",
    "embedded",
    "engine",
    "evidence",
    "kafka",
    "kafka3",
    "postgres",
    "pytest_collection_modifyitems",
    "unique",
]

"""An effect that happens once per order, whatever is delivered twice."""

from typing import Any

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session


def _insert_once(dialect: str, table: Table, values: dict[str, object]) -> Any:
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(table).values(values).on_conflict_do_nothing().returning(table.primary_key.columns[0])


async def insert_once(session: AsyncSession, table: Table, **values: object) -> bool:
    """Whether the row is new; its primary key decides."""
    result = await session.execute(_insert_once(session.get_bind().dialect.name, table, values))
    return result.first() is not None


def insert_once_sync(session: Session, table: Table, **values: object) -> bool:
    """`insert_once` for sync handlers."""
    return session.execute(_insert_once(session.get_bind().dialect.name, table, values)).first() is not None


def add_to(table: Table, dialect: str, key: dict[str, object], amounts: dict[str, int]) -> Any:
    """A statement that adds amounts to a row, which is made when it is missing."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    statement = insert(table).values({**key, **amounts})
    return statement.on_conflict_do_update(
        index_elements=list(key), set_={name: table.c[name] + amount for name, amount in amounts.items()}
    )

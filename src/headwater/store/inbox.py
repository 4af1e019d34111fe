"""Inbox: an event's effect on the database happens once, however often the event is delivered.

Promise    The row (group, event id) is inserted in the handler's own transaction: whoever commits it first has made the
           effect, everybody else finds the row. A second one that comes while the first is still open waits for it.
           Giving up writes the row as dead, so that an event is never both handled and dead; a redrive flips it.
Not        Effects outside this database.
Needs      Event ids that stay the same when an event is delivered again. A replay handles events again under another
           generation.
Proof      tests/store/test_inbox.py
"""

from enum import StrEnum

from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from headwater.store.tables import inbox


class State(StrEnum):
    DONE = "done"
    DEAD = "dead"


def claim(session: Session, group: str, event_id: str, generation: int, is_redriven: bool) -> State | None:
    """None: the event is this transaction's. Else what became of it."""
    if _insert(session, group, event_id, generation, State.DONE):
        return None
    if is_redriven and _flip(session, group, event_id, generation):
        return None
    return _state(session, group, event_id, generation)


def give_up(session: Session, group: str, event_id: str, generation: int) -> bool:
    """False when the event was handled after all."""
    if _insert(session, group, event_id, generation, State.DEAD):
        return True
    return _state(session, group, event_id, generation) is State.DEAD


def _insert(session: Session, group: str, event_id: str, generation: int, state: State) -> bool:
    # Whether a row went in is asked by RETURNING: a count of rows is not known on every driver.
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    values = {"consumer_group": group, "event_id": event_id, "generation": generation, "state": state.value}
    statement = insert(inbox).values(values).on_conflict_do_nothing().returning(inbox.c.state)
    return session.execute(statement).first() is not None


def _flip(session: Session, group: str, event_id: str, generation: int) -> bool:
    columns = inbox.c
    found = session.execute(
        update(inbox)
        .where(
            columns.consumer_group == group,
            columns.event_id == event_id,
            columns.generation == generation,
            columns.state == State.DEAD.value,
        )
        .values(state=State.DONE.value)
        .returning(columns.state)
    )
    return found.first() is not None


def _state(session: Session, group: str, event_id: str, generation: int) -> State:
    columns = inbox.c
    query = select(columns.state).where(
        columns.consumer_group == group, columns.event_id == event_id, columns.generation == generation
    )
    return State(session.execute(query).scalar_one())


def delete_older(session: Session, group: str, before: object) -> int:
    """How many rows of events from before that time went; what is older than the topic keeps can't come again."""
    columns = inbox.c
    done = session.execute(delete(inbox).where(columns.consumer_group == group, columns.created_at < before))
    return int(done.rowcount)  # type: ignore[attr-defined]

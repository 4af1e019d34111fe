"""What a saga does next: a function of what is remembered and what happened. No I/O.

    running        a step's command was sent, and its answer is waited for
    compensating   what was done is undone, the last step first
    completed      all steps are done
    failed         all that was done is undone
    stuck          a compensation was not confirmed, however often it was sent: somebody must look

A step whose deadline passes may have had its effect or not, so it is compensated like one that is done: compensations must
allow for nothing to undo. An answer that comes late, when its step was given up, has an effect behind it that may have come
after the compensation: that is sent once more. What comes twice changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

COMPENSATION_ATTEMPTS = 5


class Status(StrEnum):
    RUNNING = "running"
    COMPENSATING = "compensating"
    COMPLETED = "completed"
    FAILED = "failed"
    STUCK = "stuck"


@dataclass(frozen=True)
class Step:
    """One step of a saga.

    command: what is sent, made of the state; an event or command of the application's topics.
    done, failed: the answers. failed=None: it can't fail, but by its deadline.
    remember: the state after the answer, from the state and the answer.
    compensation: what undoes it; None: there is nothing to undo. compensated: its answer; None: it counts when it is sent.
    deadline: for the answer to the command, and for that to the compensation; None: for ever.
    """

    name: str
    command: Callable[[Any], object]
    done: type
    failed: type | None = None
    remember: Callable[[Any, Any], Any] | None = None
    compensation: Callable[[Any], object] | None = None
    compensated: type | None = None
    deadline: str | None = None


class Record(msgspec.Struct, frozen=True):
    """What is remembered of one saga, beside its state."""

    status: Status = Status.RUNNING
    step: int = 0
    """That is at work, or that is being compensated."""
    turn: int = 0
    """Rises whenever something new is waited for: an older deadline means nothing any more."""
    undo: tuple[int, ...] = ()
    """Steps that are still to be compensated, the next one first."""
    attempts: int = 0
    """How often the compensation at work was sent."""
    names: tuple[str, ...] = ()
    """Of the steps, when it began: what the numbers here mean."""
    is_told: bool = False
    """The failure was published."""
    reason: str = ""


class Wait(NamedTuple):
    """A deadline that is set, for this turn."""

    turn: int
    after: str


class Decision(NamedTuple):
    record: Record
    state: Any
    publish: list[object]
    wait: Wait | None
    """None: nothing is waited for with a deadline any more."""


class Definition(NamedTuple):
    steps: Sequence[Step]
    completed: Callable[[Any], object] | None
    failed: Callable[[Any, str], object] | None


def start(saga: Definition, state: Any) -> Decision:
    return _send(saga, Record(names=tuple(step.name for step in saga.steps)), state)


def aligned(saga: Definition, record: Record) -> Record | None:
    """The record with the numbers that its steps have today; None when one that it needs is not there any more."""
    names = [step.name for step in saga.steps]
    if tuple(names) == record.names:
        return record
    if record.status in (Status.COMPLETED, Status.FAILED):  # it is at no step
        return msgspec.structs.replace(record, step=0, undo=(), names=tuple(names))
    needed = [record.names[i] for i in (record.step, *record.undo)]
    if any(name not in names for name in needed):
        return None
    step, *undo = (names.index(name) for name in needed)
    return msgspec.structs.replace(record, step=step, undo=tuple(undo), names=tuple(names))


def answer(saga: Definition, record: Record, state: Any, event: object) -> Decision | None:
    """None when it changes nothing."""
    for i, step in enumerate(saga.steps):
        if type(event) is step.done:
            return _done(saga, record, state, i, event)
        if type(event) is step.failed:
            if record.status is Status.RUNNING and i == record.step:
                return _give_up(saga, record, state, f"{step.name} failed: {type(event).__name__}", range(i))
            return None
        if type(event) is step.compensated:
            if record.status in (Status.COMPENSATING, Status.STUCK) and i == record.step:
                return _undo_next(saga, record, state)
            return None
    return None


def deadline(saga: Definition, record: Record, state: Any, turn: int) -> Decision | None:
    """None when it isn't waited for any more."""
    if turn != record.turn:
        return None
    step = saga.steps[record.step]
    if record.status is Status.RUNNING:
        return _give_up(
            saga, record, state, f"{step.name} had no answer within {step.deadline}", range(record.step + 1)
        )
    if record.status is not Status.COMPENSATING:
        return None
    if record.attempts < COMPENSATION_ATTEMPTS:
        return _undo(saga, record, state, record.step, record.attempts + 1)
    reason = f"{record.reason}; the compensation of {step.name} was sent {record.attempts} times without an answer"
    return Decision(
        msgspec.structs.replace(record, status=Status.STUCK, turn=record.turn + 1, reason=reason), state, [], None
    )


def resume(saga: Definition, record: Record, state: Any, *, is_compensated: bool) -> Decision | None:
    """Of a stuck one: send the compensation again, or take it as done. None when it is not stuck."""
    if record.status is not Status.STUCK:
        return None
    if is_compensated:
        return _undo_next(saga, record, state)
    return _undo(saga, record, state, record.step, 1)


def _done(saga: Definition, record: Record, state: Any, i: int, event: object) -> Decision | None:
    step = saga.steps[i]
    if record.status is Status.RUNNING:
        if i != record.step:
            return None
        if step.remember is not None:
            state = step.remember(state, event)
        if i + 1 < len(saga.steps):
            return _send(saga, msgspec.structs.replace(record, step=i + 1), state)
        finished = msgspec.structs.replace(record, status=Status.COMPLETED, turn=record.turn + 1)
        return Decision(finished, state, [saga.completed(state)] if saga.completed is not None else [], None)
    if record.status is Status.COMPLETED or step.compensation is None:
        return None  # a duplicate, or nothing to undo
    if step.remember is not None:
        state = step.remember(state, event)  # what undoes it may need to know
    if i in record.undo:  # its compensation is still to be sent
        return Decision(record, state, [], _same_wait(saga, record))
    if record.status is Status.FAILED:
        return _undo(saga, record, state, i, 1)
    return Decision(msgspec.structs.replace(record, undo=(*record.undo, i)), state, [], _same_wait(saga, record))


def _same_wait(saga: Definition, record: Record) -> Wait | None:
    after = saga.steps[record.step].deadline
    return Wait(record.turn, after) if after is not None and record.status is Status.COMPENSATING else None


def _send(saga: Definition, record: Record, state: Any) -> Decision:
    step = saga.steps[record.step]
    record = msgspec.structs.replace(record, turn=record.turn + 1)
    wait = Wait(record.turn, step.deadline) if step.deadline is not None else None
    return Decision(record, state, [step.command(state)], wait)


def _give_up(saga: Definition, record: Record, state: Any, reason: str, steps: range) -> Decision:
    undo = tuple(i for i in reversed(steps) if saga.steps[i].compensation is not None)
    record = msgspec.structs.replace(record, status=Status.COMPENSATING, undo=undo, reason=reason)
    return _undo_next(saga, record, state)


def _undo_next(saga: Definition, record: Record, state: Any) -> Decision:
    """The next compensations: those that need no answer at once, up to one that does."""
    publish: list[object] = []
    while record.undo:
        i, *rest = record.undo
        record = msgspec.structs.replace(record, undo=tuple(rest))
        decision = _undo(saga, record, state, i, 1)
        publish += decision.publish
        if decision.record.status is Status.COMPENSATING and saga.steps[i].compensated is not None:
            return decision._replace(publish=publish)
        record = decision.record
    if not record.is_told and saga.failed is not None:
        publish.append(saga.failed(state, record.reason))
    over = msgspec.structs.replace(record, status=Status.FAILED, turn=record.turn + 1, is_told=True)
    return Decision(over, state, publish, None)


def _undo(saga: Definition, record: Record, state: Any, i: int, attempts: int) -> Decision:
    step = saga.steps[i]
    assert step.compensation is not None
    # one that needs no answer is over when it is sent: a failed saga stays what it is
    status = (
        Status.COMPENSATING if step.compensated is not None or record.status is not Status.FAILED else Status.FAILED
    )
    record = msgspec.structs.replace(record, status=status, step=i, turn=record.turn + 1, attempts=attempts)
    wait = None
    if step.compensated is not None and step.deadline is not None:
        wait = Wait(record.turn, step.deadline)
    return Decision(record, state, [step.compensation(state)], wait)

"""A handler: an application's function for events, and what its signature asks for.

    @app.handler(orders, group="inventory-reservation")
    async def reserve_stock(event: OrderCreated, uow: UnitOfWork) -> StockReserved | None: ...

The first parameter's type says which events it is for: one class, or a union; events of other types in the topic are
skipped. A parameter annotated UnitOfWork gets one around the call, one annotated Envelope the event's envelope, one
annotated IdempotencyKey the key by which services outside shall know the call, one annotated Position where the event
stands. What the handler returns is published: through the outbox with a unit of work, else acknowledged before the event
counts as handled. Sync functions run in a thread.

A first parameter `list[OrderCreated]` makes it a batch handler: it returns None when all are handled, or one outcome for
each: None, an event to publish, or an exception.
"""

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwater.declaration import WrongDeclaration
from headwater.event.envelope import Envelope, IdempotencyKey, Position
from headwater.event.event import Tombstone
from headwater.event.topic import Topic
from headwater.runtime.assignment import Policy, Received
from headwater.runtime.retry import Delivery, Errors, FailureKinds, GivingUp, Retry
from headwater.runtime.retry_topic import dead_topic, retry_topic
from headwater.settings import InvalidSetting, duration_seconds
from headwater.store.unit_of_work import UnitOfWork

Function = Callable[..., Any]


class InvalidHandler(WrongDeclaration, TypeError):
    """A function that can't be a handler; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Tier:
    """What a handler's lag in seconds should stay under, and where it alarms."""

    target: str
    alarm: str

    @property
    def target_seconds(self) -> float:
        return duration_seconds(self.target)

    @property
    def alarm_seconds(self) -> float:
        return duration_seconds(self.alarm)


@dataclass(frozen=True, slots=True)
class Options:
    """How a handler is run: see `App.handler`."""

    delivery: Delivery = Delivery.AT_LEAST_ONCE
    retry: Retry | None = field(default_factory=Retry)
    giving_up: GivingUp = GivingUp.SKIP
    poison: Errors = ()
    conflict: Errors = ()
    unavailable: Errors = ()
    concurrency: int = 100
    threads: int = 8
    batch: int = 500
    tier: Tier | None = None
    group_protocol: str | None = None
    outside_effects: bool = False
    on_gap: str = "stop"
    transaction_records: int = 1000


class Handler:
    def __init__(self, function: Function, topic: Topic, group: str, options: Options | None = None) -> None:
        """Raises InvalidHandler."""
        self.options = options or Options()
        self.delivery = self.options.delivery
        self.batch = 0
        """How many events it gets at most, when it is a batch handler; else 0."""
        self.function = function
        self.topic = topic
        self.group = group
        self.name = getattr(function, "__name__", repr(function))
        self.is_async = _is_async(function)
        self.uow_parameter: str | None = None
        self.envelope_parameter: str | None = None
        self.key_parameter: str | None = None
        self.position_parameter: str | None = None
        self.returns: list[type] = []
        """The event classes that it says it returns."""
        self.classes = self._inspect()
        self._check_options()

    @property
    def dead_topic(self) -> str:
        """Where the events go that were given up on."""
        return dead_topic(self.topic.name, self.group)

    @property
    def retry_topic(self) -> str:
        """Where the events wait that failed, and those behind them."""
        return retry_topic(self.topic.name, self.group)

    def policy(self) -> Policy:
        options = self.options
        return Policy(
            self.name,
            options.retry,
            options.giving_up,
            FailureKinds(options.poison, options.conflict, options.unavailable),
            settles_first=self.delivery is Delivery.AT_MOST_ONCE,
            batch=self.batch,
            outside_effects=options.outside_effects,
        )

    def _check_options(self) -> None:
        options = self.options
        for name, value in (("concurrency", options.concurrency), ("threads", options.threads), ("batch", options.batch),
                            ("transaction_records", options.transaction_records)):  # fmt: skip
            if value < 1:
                raise InvalidHandler(f"the handler {self.name} has {name}={value}: at least 1 is needed.")
        if options.retry is not None and not isinstance(options.retry, Retry):
            raise InvalidHandler(
                f"the handler {self.name} has retry={options.retry!r}: a Retry is needed, as in Retry(5, '1s..1m'), or None."
            )
        for kind, errors in (
            ("poison", options.poison),
            ("conflict", options.conflict),
            ("unavailable", options.unavailable),
        ):
            for each in errors:
                if not (isinstance(each, type) and issubclass(each, BaseException)):
                    raise InvalidHandler(
                        f"the handler {self.name} has {kind}=[{each!r}]: exception classes are needed."
                    )
        if options.tier is not None:
            try:
                _ = options.tier.target_seconds, options.tier.alarm_seconds
            except InvalidSetting as error:
                raise InvalidHandler(f"the handler {self.name} has a tier that is no duration: {error}") from None
        if options.group_protocol not in (None, "classic", "consumer"):
            raise InvalidHandler(
                f"the handler {self.name} has group_protocol={options.group_protocol!r}: classic or consumer."
            )
        if options.on_gap not in ("stop", "skip"):
            raise InvalidHandler(f"the handler {self.name} has on_gap={options.on_gap!r}: stop or skip.")
        if self.delivery is Delivery.EFFECTIVELY_ONCE and self.uow_parameter is None:
            raise InvalidHandler(
                f"the handler {self.name} is effectively_once, but takes no UnitOfWork: its effect happens once because it "
                "shares a transaction with the inbox. Add a parameter `uow: UnitOfWork`, and write through it."
            )
        if self.delivery is Delivery.EXACTLY_ONCE and self.uow_parameter is not None:
            raise InvalidHandler(
                f"the handler {self.name} is exactly_once, which covers what it returns, and takes a UnitOfWork, which it "
                "doesn't cover: use effectively_once."
            )
        if self.delivery is Delivery.AT_MOST_ONCE and options.retry is None:
            raise InvalidHandler(
                f"the handler {self.name} is at_most_once, which tries nothing again, and has retry=None, which tries for "
                "ever: leave retry out; what fails goes to the dead-letter topic."
            )
        if self.delivery is Delivery.EXACTLY_ONCE and options.retry is None:
            raise InvalidHandler(
                f"the handler {self.name} is exactly_once, which needs a retry policy: retry=Retry(...)."
            )

    @property
    def arguments_of_event(self) -> bool:
        """Whether it takes more of an event than its data."""
        return any((self.envelope_parameter, self.key_parameter, self.position_parameter))

    def arguments(self, envelope: Envelope, record: Received, uow: UnitOfWork | None) -> dict[str, object]:
        extra: dict[str, object] = {}
        if self.uow_parameter is not None:
            extra[self.uow_parameter] = uow
        if self.envelope_parameter is not None:
            extra[self.envelope_parameter] = envelope
        if self.key_parameter is not None:
            extra[self.key_parameter] = IdempotencyKey(f"{self.group}:{envelope.event_id}")
        if self.position_parameter is not None:
            extra[self.position_parameter] = Position(self.topic.name, record.partition() or 0, record.offset() or 0)
        return extra

    def _inspect(self) -> Sequence[type]:
        try:
            hints = typing.get_type_hints(self.function)
        except NameError as error:
            raise InvalidHandler(f"the handler {self.name} has an annotation that can't be resolved: {error}") from None
        parameters = list(inspect.signature(self.function).parameters)
        if not parameters or parameters[0] not in hints:
            raise InvalidHandler(
                f"the handler {self.name} must say which events it takes: annotate its first parameter with a class of "
                f"{self.topic.name}."
            )
        wanted = hints[parameters[0]]
        if typing.get_origin(wanted) in (list, Sequence):
            self.batch = self.options.batch
            (wanted,) = typing.get_args(wanted)
        for name in parameters[1:]:
            if hints.get(name) is UnitOfWork:
                self.uow_parameter = name
            elif hints.get(name) is Envelope and not self.batch:
                self.envelope_parameter = name
            elif hints.get(name) is IdempotencyKey and not self.batch:
                self.key_parameter = name
            elif hints.get(name) is Position and not self.batch:
                self.position_parameter = name
            else:
                raise InvalidHandler(
                    f"the handler {self.name} has the parameter {name!r}, which nothing is known for: annotate it with "
                    "UnitOfWork, Envelope, IdempotencyKey or Position, or leave it out."
                )
        self.returns = [
            cls
            for cls in _choices(_element(hints.get("return")) if self.batch else hints.get("return"))
            if isinstance(cls, type) and cls is not type(None) and not issubclass(cls, BaseException)
        ]
        classes = _choices(wanted)
        if classes == (Tombstone,):
            raise InvalidHandler(
                f"the handler {self.name} takes tombstones alone: name an event of {self.topic.name} too."
            )
        for cls in classes:
            if cls is Tombstone:
                if not self.topic.is_compacted:
                    raise InvalidHandler(
                        f"the handler {self.name} takes tombstones, but {self.topic.name} is not compacted."
                    )
            elif cls not in self.topic.events:
                raise InvalidHandler(
                    f"the handler {self.name} takes {getattr(cls, '__name__', cls)}, which {self.topic.name} doesn't list."
                )
        return classes


def group_of(name: str, topic: Topic, among: Sequence[Topic]) -> str:
    """Of a saga or a pattern that reads several topics: `<name>-<the topic's last word>`, and with all of the topic's name
    where two of them end in one word."""
    words = [each.name.rpartition(".")[2] for each in among]
    word = topic.name.rpartition(".")[2]
    return f"{name}-{word if words.count(word) < 2 else topic.name}"


def _element(hint: Any) -> Any:
    """Of a list of outcomes, or of such a list or None."""
    for choice in _choices(hint):
        if typing.get_origin(choice) in (list, Sequence):
            return typing.get_args(choice)[0]
    return None


def _choices(hint: Any) -> tuple[Any, ...]:
    """The classes that a hint names."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_async(function: Function) -> bool:
    """Also for objects that are called, and for functions behind a wrapper."""
    called = inspect.unwrap(function)
    return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(getattr(called, "__call__", None))  # noqa: B004

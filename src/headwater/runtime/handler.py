"""A handler: an application's function for events, and what its signature asks for.

    @app.handler(orders, group="inventory-reservation")
    async def reserve_stock(event: OrderCreated, uow: UnitOfWork) -> StockReserved | None: ...

The first parameter's type says which events it is for: one class, or a union; events of other types in the topic are
skipped. A parameter annotated UnitOfWork gets one around the call, one annotated Envelope the event's envelope. What
the handler returns is published: through the outbox with a unit of work, else acknowledged before the event counts as
handled. Sync functions run in a thread.
"""

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from headwater.event.codec import Decoder
from headwater.event.envelope import Envelope
from headwater.event.topic import Topic
from headwater.store.unit_of_work import UnitOfWork

Function = Callable[..., Any]


class InvalidHandler(TypeError):
    """A function that can't be a handler; the message says what to change."""


class Handler:
    def __init__(self, function: Function, topic: Topic, group: str) -> None:
        """Raises InvalidHandler."""
        self.function = function
        self.topic = topic
        self.group = group
        self.name = getattr(function, "__name__", repr(function))
        self.is_async = _is_async(function)
        self.uow_parameter: str | None = None
        self.envelope_parameter: str | None = None
        self.returns: list[type] = []
        """The event classes that it says it returns."""
        self.classes = self._inspect()
        self.decoder = Decoder(self.classes)

    @property
    def dead_topic(self) -> str:
        """Where the records go that can't be decoded."""
        return f"{self.topic.name}.{self.group}.dead"

    def arguments(self, envelope: Envelope, uow: UnitOfWork | None) -> dict[str, object]:
        extra: dict[str, object] = {}
        if self.uow_parameter is not None:
            extra[self.uow_parameter] = uow
        if self.envelope_parameter is not None:
            extra[self.envelope_parameter] = envelope
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
        for name in parameters[1:]:
            if hints.get(name) is UnitOfWork:
                self.uow_parameter = name
            elif hints.get(name) is Envelope:
                self.envelope_parameter = name
            else:
                raise InvalidHandler(
                    f"the handler {self.name} has the parameter {name!r}, which nothing is known for: annotate it with "
                    "UnitOfWork or Envelope, or leave it out."
                )
        self.returns = [cls for cls in _choices(hints.get("return")) if isinstance(cls, type) and cls is not type(None)]
        classes = _choices(hints[parameters[0]])
        for cls in classes:
            if cls not in self.topic.events:
                raise InvalidHandler(
                    f"the handler {self.name} takes {getattr(cls, '__name__', cls)}, which {self.topic.name} doesn't list."
                )
        return classes


def _choices(hint: Any) -> tuple[Any, ...]:
    """The classes that a hint names."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_async(function: Function) -> bool:
    """Also for objects that are called, and for functions behind a wrapper."""
    called = inspect.unwrap(function)
    return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(getattr(called, "__call__", None))  # noqa: B004

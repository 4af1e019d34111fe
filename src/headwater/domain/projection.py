"""Projection: a read model that follows topics, with its progress in the transaction of its rows.

    class CustomerOrders(Base):
        __tablename__ = "customer_orders"
        customer_id: Mapped[str] = mapped_column(primary_key=True)
        orders: Mapped[int]
        total_cents: Mapped[int]

    history = Projection("customer-orders", topics=[orders], tables=[CustomerOrders])

    @history.on
    def count(event: OrderCreated, rows: Rows) -> None:
        row = rows.get(CustomerOrders, event.customer_id) or CustomerOrders(
            customer_id=event.customer_id, orders=0, total_cents=0
        )
        row.orders += 1
        row.total_cents += event.total_cents
        rows.put(row)

    history.join(app)

`headwater projections rebuild` builds it anew beside the live one, and puts it in its place.

Promise    Every event changes the rows once, in the order of its partition, also when its producer published it twice, as an
           outbox does whose relay dies. A rebuild is never behind what it replaces, and each statement sees the one or the other
           whole.
Not        Events that come again after 10,000 others of their partition, as when somebody copies a topic into itself: go by the
           ids of things. Order between partitions. More than one process at a time: others take over when it dies. Effects
           outside the tables.
Needs      Functions that go by the event and the rows alone: what a clock or a chance decides comes out otherwise the next time.
           Topics that still have what the rows are made of.
Proof      tests/domain/test_projection.py
"""

import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from headwater.declaration import WrongDeclaration
from headwater.domain.repeats import Repeats
from headwater.event.codec import Undecodable, Unknown
from headwater.event.envelope import Envelope
from headwater.event.event import Tombstone
from headwater.event.topic import Topic
from headwater.kafka.consumer import Message
from headwater.kafka.reader import offset_of, place_of
from headwater.runtime.app import App
from headwater.runtime.decoding import SchemaSource, TopicDecoder
from headwater.runtime.subscription import Runner, Surroundings
from headwater.store.rows import Rows, Shape, Side, shape_of

F = TypeVar("F", bound=Callable[..., None])


class InvalidProjection(WrongDeclaration, TypeError):
    """A declaration that can't work; the message says what to change."""


class Function(NamedTuple):
    call: Callable[..., None]
    takes_envelope: bool


class Projection:
    def __init__(self, name: str, *, topics: Sequence[Topic], tables: Sequence[type], version: str = "1") -> None:
        """name: of the projection, and of the group under which its progress is shown. tables: mapped classes of SQLAlchemy.
        version: what its functions and tables make; raise it with them, and rebuild. Raises InvalidProjection,
        InvalidReadModel."""
        if not topics or not tables:
            raise InvalidProjection(f"the projection {name} needs topics and tables.")
        if not all(isinstance(each, Topic) for each in topics):
            raise InvalidProjection(f"the topics of {name} are Topics, as the App has them: {topics!r}.")
        self.name = name
        self.topics = tuple(topics)
        self.tables = tuple(tables)
        self.version = version
        self.needs_database = True
        self._functions: dict[type, Function] = {}
        for side in Side:
            self.shapes(side)

    def shapes(self, side: Side) -> list[Shape]:
        return [shape_of(cls, side) for cls in self.tables]

    def on(self, function: F) -> F:
        """The function is called for the events that its first parameter names, with the rows, and with the envelope if it has
        a parameter for it. Raises InvalidProjection."""
        name = getattr(function, "__name__", repr(function))
        if inspect.iscoroutinefunction(function):
            raise InvalidProjection(
                f"{name} is async: what it reads and writes is in memory, so a plain function will do."
            )
        hints = typing.get_type_hints(function)
        first, *others = inspect.signature(function).parameters
        wanted: tuple[Any, ...] = (hints.get(first),)
        if typing.get_origin(wanted[0]) in (typing.Union, types.UnionType):
            wanted = typing.get_args(wanted[0])
        kinds = [hints.get(other) for other in others]
        if kinds not in ([Rows], [Rows, Envelope]):
            raise InvalidProjection(
                f"{name} takes an event and rows: Rows, and an envelope: Envelope if it needs that."
            )
        for cls in wanted:
            listed = cls is Tombstone or any(cls in topic.events for topic in self.topics)
            if not listed:
                raise InvalidProjection(
                    f"{name} takes {getattr(cls, '__name__', cls)}, which none of {self.name}'s topics lists."
                )
            if cls in self._functions:
                raise InvalidProjection(f"{self.name} has two functions for {cls.__name__}.")
            self._functions[cls] = Function(function, len(kinds) == 2)
        return function

    def join(self, app: App) -> None:
        """Keep it up to date in this application. Raises InvalidProjection, InvalidHandler where its name is taken."""
        if not self._functions:
            raise InvalidProjection(f"the projection {self.name} has no functions: give it some with @{self.name}.on.")
        for other in app.beside:
            shared = set(other.tables) & set(self.tables) if isinstance(other, Projection) else set()
            if shared:
                raise InvalidProjection(
                    f"{self.name} and {other.name} both have the table of {', '.join(cls.__name__ for cls in shared)}: nobody "
                    "else writes a projection's tables. Give it one of its own, or one projection both topics."
                )
        app.run_beside(self)

    def begin(self, around: Surroundings, topic_ids: Mapping[str, str]) -> Runner:
        """See `headwater.runtime.subscription.Beside`."""
        from headwater.domain.projector import Projector

        projector = Projector(self, around, topic_ids)
        projector.start()
        return projector

    # Its events

    def events_of(self, topic: Topic) -> list[type]:
        """Those that it has functions for."""
        classes: list[type] = [cls for cls in topic.events if cls in self._functions]
        return [*classes, Tombstone] if Tombstone in self._functions and topic.is_compacted else classes

    def decoders(self, topic_ids: Mapping[str, str], schemas: SchemaSource) -> dict[str, TopicDecoder]:
        """By topic; of those that it has functions for."""
        found = {}
        for topic in self.topics:
            classes = self.events_of(topic)
            if classes:
                found[topic.name] = TopicDecoder(topic, classes, topic_ids[topic.name], schemas)
        return found

    def apply(self, record: Message, decoder: TopicDecoder, rows: Rows, repeats: Repeats) -> None:
        """Unless it is a repeat. Raises Undecodable, RegistryUnreachable, and what its function raises."""
        try:
            envelope = decoder.decode_now(record)
        except Unknown:
            return
        if repeats.has(place_of(record), offset_of(record), envelope):
            return
        function = self._functions[type(envelope.data)]
        if function.takes_envelope:
            function.call(envelope.data, rows, envelope)
        else:
            function.call(envelope.data, rows)

    def pass_over(self, record: Message, decoder: TopicDecoder, repeats: Repeats) -> None:
        """It is applied already, or left out; its repeats are not to be applied either. Raises RegistryUnreachable."""
        with contextlib.suppress(Undecodable, Unknown):
            repeats.has(place_of(record), offset_of(record), decoder.decode_now(record))

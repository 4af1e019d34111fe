"""The registry at work: decisions one after the other, each written and read back before the next is made."""

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

from headwater.kafka.admin import AdminError
from headwater.registry.leader import Leadership
from headwater.registry.record import Record
from headwater.registry.storage import Storage, StoreFailed
from headwater.registry.subject import Registry
from headwater.settings import Settings

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
LEADER_TRIES = 3

T = TypeVar("T")


class NotLeader(Exception):
    """Another registry writes; `address` is where it is, or None while that isn't known."""

    def __init__(self, address: str | None) -> None:
        super().__init__(address or "the writing registry is not known")
        self.address = address


class RegistryService:
    def __init__(self, settings: Settings, address: str) -> None:
        """address: where other registries reach this one."""
        self.registry = Registry()
        self._loop = asyncio.get_running_loop()
        self._storage = Storage(settings, self.registry, self._loop)
        self._address = address
        self._leadership = Leadership(
            settings, self._storage.topic, address, self._leads_changed, lambda: self._storage.applied
        )
        self._is_leader = False
        self._is_current = False
        """What the writer before wrote was read."""
        self._known = asyncio.Event()
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Returns when it has read everything. Raises AdminError, StoreFailed."""
        await self._loop.run_in_executor(None, self._storage.prepare)
        self._storage.start()
        self._leadership.start()
        await self._storage.catch_up()

    async def stop(self) -> None:
        await self._loop.run_in_executor(None, self._leadership.stop)
        await self._loop.run_in_executor(None, self._storage.stop)

    async def write(self, decide: Callable[[], tuple[list[Record], T]]) -> T:
        """Raises what `decide` raises, NotLeader, StoreFailed."""
        async with self._turn:
            await self._lead()
            records, answer = decide()
            if records:
                try:
                    await self._storage.write(records)
                except StoreFailed:
                    self._is_current = False  # it may be there all the same: look before the next decision
                    raise
            return answer

    async def _lead(self) -> None:
        """Raises NotLeader, StoreFailed."""
        if not self._leadership.is_sure:
            self._is_current = False
        if not (self._is_leader and self._leadership.is_sure):
            address = await self._address_of_leader()
            if address != self._address:
                raise NotLeader(address)
            if not self._is_leader:  # the cluster has said so, our own thread has not heard it yet
                try:
                    await asyncio.wait_for(self._known.wait(), 5.0)
                except TimeoutError:
                    raise NotLeader(None) from None
        if not self._is_current:
            await self._storage.catch_up()
            self._is_current = True

    async def _address_of_leader(self) -> str | None:
        for _ in range(LEADER_TRIES * 10):
            try:
                address = await self._loop.run_in_executor(None, self._leadership.address_of_leader)
            except AdminError as error:
                raise StoreFailed(str(error)) from None
            if address is not None:
                return address
            await asyncio.sleep(0.1)
        return None

    def _leads_changed(self, leads: bool) -> None:
        """In the leadership's thread."""
        self._loop.call_soon_threadsafe(self._set_leader, leads)

    def _set_leader(self, leads: bool) -> None:
        logger.info("leadership leads=%s", leads)
        self._is_leader, self._is_current = leads, False
        if leads:
            self._known.set()
        else:
            self._known.clear()

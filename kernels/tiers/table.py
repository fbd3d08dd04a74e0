"""A table as the graph and the optimizer see it where ids become slots: held as long as their update is due."""
from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .cache import RowCache, TierError

_numbers = itertools.count(1)
_tables: weakref.WeakValueDictionary[int, SlotTable] = weakref.WeakValueDictionary()


class Cache(Protocol):
    """What gives slots to ids."""

    slots: int

    def release(self, ticket: int) -> None: ...


class SlotTable:
    """A table whose ids become slots of ``memory``: tensors ``[slots + 1 or more, width]``, the weights first and then what the optimizer
    keeps for each row. From ``home`` on lie rows that are no slots; ``home`` itself is what lookups leave out (they name it by number, and
    it has no gradient). ``name``: the plain parameter's, for messages. ``number`` names it in a graph for as long as it lives.
    """

    what: ClassVar[str]  # such tables, for messages
    padding: int | None  # the id that is at home

    def __init__(self, name: str, cache: Cache, memory: list[Tensor]) -> None:
        self.name, self.memory = name, memory
        self._slots = cache
        self.home = cache.slots
        self.trains = True
        self.weight: Callable[[], Tensor] = lambda: memory[0]  # what lookups read now
        self._lock = threading.Lock()
        self._due: list[tuple[int, Tensor]] = []  # (ticket, slots) of rows that an update is still to come for
        self._marks = torch.zeros(len(memory[0]), dtype=torch.bool, device=memory[0].device)  # to compare slots with; all False
        self._looked: dict[int, list[int]] = {}  # by thread: tickets of lookups without gradients
        self.looked: Callable[[], None] | None = None  # called after each lookup: the rows are read next, for which nobody needs Python's lock
        self.waited = 0.0  # seconds that lookups took to have their rows
        self._ahead: deque[tuple[int, Tensor, Tensor, int, bool]] = deque()  # (batch, ids, slots, ticket, train) of what was prefetched
        self.number = next(_numbers)
        _tables[self.number] = self

    def slots(self, ids: Tensor, first: bool = True) -> Tensor:
        """The slots (int64, of the shape of ``ids``) where the rows of ``ids`` are until their update: until :meth:`updated` where
        gradients are on, else until the thread's next lookup that is its graph's ``first``. Raises what :meth:`_fetch` raises.
        """
        self._check_weight()
        train = self.trains and torch.is_grad_enabled()
        ids = ids if ids.dtype is torch.int64 else ids.detach().to(torch.int64)
        started = time.perf_counter()
        with self._lock:
            if first:
                self._release_looked()
            if self._ahead and self._ahead[0][4] == train and self._fetched_for(ids, self._ahead[0]):
                _, _, slots, ticket, _ = self._ahead.popleft()
            else:
                slots, ticket = self._fetch(ids, train)
            try:
                self._taken(ticket)
            except BaseException:
                self._slots.release(ticket)
                raise
            if train:
                self._due.append((ticket, slots))
            else:
                self._looked.setdefault(threading.current_thread().ident or 0, []).append(ticket)
        self.waited += time.perf_counter() - started
        if (looked := self.looked) is not None:  # another thread may end the pipeline
            looked()
        return slots

    def _fetched_for(self, ids: Tensor, ahead: tuple[int, Tensor, Tensor, int, bool]) -> bool:
        """Whether ``ahead`` was prefetched for a lookup of ``ids``."""
        return torch.equal(ahead[1], ids)

    def _taken(self, ticket: int) -> None:
        """A lookup is about to read the rows that ``ticket`` holds. Raises what :meth:`_fetch` raises, where they did not come."""

    def prefetch(self, ids: Tensor, batch: int) -> None:
        """Bring the rows that the lookup of ``batch`` will want, in the order of the lookups; raises what :meth:`slots` raises."""
        train = self.trains and torch.is_grad_enabled()
        ids = ids.detach().to(torch.int64, copy=True)
        slots, ticket = self._fetch(ids, train, later=True)  # without the lock: the present batch goes on meanwhile
        with self._lock:
            self._ahead.append((batch, ids, slots, ticket, train))

    def drop_before(self, batch: int | None) -> None:
        """Let go of what was prefetched for batches before ``batch`` (``None``: for all) and not looked up."""
        with self._lock:
            while self._ahead and (batch is None or self._ahead[0][0] < batch):
                self._slots.release(self._ahead.popleft()[3])

    def _release_looked(self) -> None:
        if not self._looked:
            return
        mine = threading.current_thread().ident or 0
        gone = set(self._looked) - {mine}
        if gone:
            gone -= {t.ident for t in threading.enumerate()}
        for thread in (mine, *gone):
            for ticket in self._looked.pop(thread, ()):
                self._slots.release(ticket)

    def _check_weight(self) -> None:
        weight = self.weight()
        if weight.shape == self.memory[0].shape and weight.data_ptr() != self.memory[0].data_ptr():  # a capture has a stand-in of all rows
            raise TierError(
                f"table '{self.name}': its cache was replaced by a tensor of {weight.dtype} on {weight.device} (.to(), .half(), .double(), "
                f".data = ...?), which its rows do not come to: {self.what} stay float32 on the CPU; optimize a model anew"
            )
        if weight.requires_grad and not self.trains:
            raise TierError(f"table '{self.name}' was frozen when optimize() ran, so that its rows are not written back: optimize it with requires_grad, then freeze it")

    def check_held(self, slots: Tensor) -> None:
        """Raises :class:`TierError` where ``slots``, of an update, are not all of lookups since the last one: their rows may have left."""
        with self._lock:
            if any(s.data_ptr() == slots.data_ptr() and s.shape == slots.shape and s.dtype == slots.dtype for _, s in self._due):
                return  # they are a lookup's own
            for _, due in self._due:
                self._marks.index_fill_(0, due.flatten(), True)
            self._marks[self.home :] = True
            held = bool(self._marks.index_select(0, slots.flatten()).all())
            for _, due in self._due:
                self._marks.index_fill_(0, due.flatten(), False)
            self._marks[self.home :] = False
        if not held:
            raise TierError(
                f"table '{self.name}': the update is for rows that were looked up before the last one, and may have left since. "
                "Nothing was updated. Call zero_grad() after each step(), and no backward of a forward from before it"
            )

    def _fetch(self, ids: Tensor, train: bool, later: bool = False) -> tuple[Tensor, int]:
        """The slots of ``ids`` (int64, any shape), with their rows in ``memory`` (``later``: after :meth:`_taken` at the latest), and the ticket that holds them. ``train``: gradients are on."""
        raise TypeError(f"{type(self).__name__} must define _fetch()")

    def updated(self) -> None:
        """The optimizer stepped: what was looked up may leave."""
        with self._lock:
            for ticket, _ in self._due:
                self._slots.release(ticket)
            self._due.clear()


class TieredTable(SlotTable):
    """``cache``: whose ``parts[0]`` holds the weights. ``memory``: those tensors with one row more, at ``home``, where the row ``padding``
    lives for good. Negative ids count from the end, as in ``weight[ids]``.
    """

    what = "tables in tiers"

    def __init__(self, name: str, cache: RowCache, memory: list[Tensor], padding: int | None) -> None:
        super().__init__(name, cache, memory)
        self.cache, self.padding = cache, padding
        self.start_padding()

    def start_padding(self) -> None:
        """Put the row ``padding`` at home, as the store has it."""
        if self.padding is not None:
            for part, tensor in enumerate(self.memory):
                tensor.data[self.home] = self.cache.read(torch.tensor([self.padding]), part)[0]

    def _fetch(self, ids: Tensor, train: bool, later: bool = False) -> tuple[Tensor, int]:
        """Raises ``IndexError`` for an id outside the table and :class:`TierError` where the rows under way do not fit the cache."""
        wanted = None if self.padding is None else ids != self.padding
        try:
            found, ticket = self.cache.fetch(ids if wanted is None else ids[wanted], train=train, later=later)
        except TierError as error:
            counted = self._from_the_start(ids)
            if counted is not ids:
                return self._fetch(counted, train, later)
            held = f". {len(self._due)} lookups wait for their update and {len(self._ahead)} were prefetched: call the optimizer's step(), and look up what is not trained under torch.no_grad()"
            raise TierError(f"table '{self.name}': {error}{held if 'too small' in str(error) else ''}") from None
        if wanted is not None:
            found = torch.full_like(ids, self.home).masked_scatter_(wanted, found)
        return found, ticket

    def _from_the_start(self, ids: Tensor) -> Tensor:
        """``ids`` without negative ones; ``ids`` itself where there are none. Raises ``IndexError`` for one outside the table."""
        rows = self.cache.rows
        low, high = (int(v) for v in torch.aminmax(ids)) if ids.numel() else (0, 0)
        if low < -rows or high >= rows:
            raise IndexError(f"id {high if high >= rows else low} is out of range for table '{self.name}' of {rows} rows")
        return torch.where(ids < 0, ids + rows, ids) if low < 0 else ids

    def _taken(self, ticket: int) -> None:
        try:
            self.cache.complete(ticket)
        except TierError as error:
            raise TierError(f"table '{self.name}': {error}") from None

    def read(self, first: int, last: int, part: int = 0) -> Tensor:
        """Rows ``first`` to ``last`` (exclusive) as they are now, ``[n, width]``."""
        rows = torch.arange(first, last)
        values = self.cache.read(rows, part)
        if self.padding is not None and first <= self.padding < last:
            values[self.padding - first] = self.memory[part][self.home]
        return values

    def write(self, first: int, values: Tensor, part: int = 0) -> None:
        """Set rows from ``first`` on."""
        self.cache.write(torch.arange(first, first + len(values)), values, part)
        if self.padding is not None and first <= self.padding < first + len(values):
            self.memory[part][self.home] = values[self.padding - first]


def table_of(number: int) -> SlotTable:
    """The table that a graph names. Raises :class:`TierError` where its model is gone."""
    found = _tables.get(number)
    if found is None:
        raise TierError("a lookup names a table whose model is gone: keep the model that optimize() returned alive")
    return found

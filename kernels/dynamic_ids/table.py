"""A table whose ids are any 64-bit numbers, as the graph and the optimizer see it."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..memory import promised, take_ahead
from ..tiers.cache import Part
from ..tiers.table import SlotTable
from .id_map import Counters, IdMap, IdMapError

_AT_ONCE = 512  # rows that are made before they are moved to their places: they stay in the processor's cache
_AHEAD = 8 << 20  # bytes of rows to come that have memory before they are made, at least


class DynamicTable(SlotTable):
    """Rows for the ids of ``ids``, and two rows more: at ``home`` zeros that lookups leave out, for the id ``padding``, and after it the
    default row, ``default`` in every column, for what has no row.

    ``parts``: what a row holds, weights first. A row that is given to an id starts from ``(seed, id)`` alone, whatever its slot held
    before. ``training()`` says whether ids may be admitted now. Memory is taken as rows are: ``memory`` has all rows from the start, and
    never moves.
    """

    what = "tables with dynamic ids"

    def __init__(self, name: str, ids: IdMap, parts: Sequence[Part], *, seed: int = 0, default: float = 0.0, padding: int | None = None) -> None:
        super().__init__(name, ids, [promised((ids.slots + 2, p.width), torch.float32) for p in parts])
        self.ids, self.parts, self.seed, self.default, self.padding = ids, tuple(parts), seed, default, padding
        self.training: Callable[[], bool] = lambda: True
        self._rows = [m.data for m in self.memory]  # writes of new rows are nothing that autograd must know of: nobody has read them
        self._default_read = False  # by a lookup whose update is due
        self._given = 0  # rows whose memory was asked for
        self._start_default()

    def _start_default(self) -> None:
        for number, (rows, part) in enumerate(zip(self._rows, self.parts)):
            rows[self.home + 1] = part.a if number else self.default

    def _fetch(self, ids: Tensor, train: bool, later: bool = False) -> tuple[Tensor, int]:
        """Raises :class:`IdMapError` where the ids to be admitted and the rows under way do not fit the capacity, and in a backward that
        computes the forward again: it would count the ids twice, and could read other rows."""
        if train and torch._C._current_graph_task_id() != -1:
            raise IdMapError(
                f"table '{self.name}' with dynamic ids is looked up again inside a backward (torch.utils.checkpoint around the model?): name the "
                "modules to be computed again in the plan instead, training: {checkpoint: [...]}, which looks nothing up twice"
            )
        try:
            slots, fresh, places, ticket, unknown = self.ids.fetch(ids, admit=train and self.training(), leave_out=self.padding)
        except IdMapError as error:
            raise IdMapError(
                f"table '{self.name}': {error}. {len(self._due)} lookups wait for their update: call the optimizer's step() after each "
                "backward, and look up what is not trained under torch.no_grad()"
            ) from None
        self._default_read |= train and unknown > 0
        if len(fresh):
            self._start(fresh, places)
        return slots, ticket

    def _start(self, ids: Tensor, slots: Tensor, first: int = 0) -> None:
        start, end = (int(slots[0]), int(slots[-1]) + 1) if len(slots) else (0, 0)
        in_a_row = end - start == len(slots) and torch.equal(slots, torch.arange(start, end))  # as long as nothing leaves
        if in_a_row:
            self._take_ahead(end)
        for number in range(first, len(self.parts)):
            rows, part = self._rows[number], self.parts[number]
            if part.start == "constant":
                rows.index_fill_(0, slots, part.a)
            elif in_a_row:
                part.rows(number, self.seed, ids, rows[start:end])
            else:
                for some, places in zip(ids.split(_AT_ONCE), slots.split(_AT_ONCE)):
                    rows.index_copy_(0, places, part.rows(number, self.seed, some))

    def _take_ahead(self, used: int) -> None:
        """New rows come one after another: have the memory of those to come."""
        margin = max(_AHEAD // sum(4 * p.width for p in self.parts), used // 16)
        if self._given < min(used + margin, self.home):
            last = min(used + 2 * margin, self.home)
            for rows in self._rows:
                take_ahead(rows[self._given : last])
            self._given = last

    def prefetch(self, ids: Tensor, batch: int) -> None:
        """Nothing: ids are admitted in the order of the training loop, and there is nothing to wait for."""

    def updated(self) -> None:
        """The optimizer stepped: the default row is what it was, and what was looked up may leave."""
        self._void_backwards()
        super().updated()
        if self._default_read:
            self._start_default()
            self._default_read = False

    def _void_backwards(self) -> None:
        """Other ids may have the slots of earlier lookups from now on: autograd refuses their backward, as it saved the slots."""
        with self._lock:
            torch.autograd.graph.increment_version([slots for _, slots in self._due])

    def counters(self) -> Counters:
        """What happened so far."""
        return self.ids.counters()

    def export(self, part: int = 0) -> tuple[Tensor, Tensor]:
        """``(ids, rows)``: int64 ``[n]`` and a copy, float32 ``[n, width]``, of the weights or another part, in the order in which ids leave."""
        with self._lock:
            ids, slots, _ = self.ids.items()
            return ids, self._rows[part].index_select(0, slots)

    def state(self) -> dict[str, Tensor]:
        """All of it but the optimizer's part: ``ids`` ``[n]``, ``rows`` ``[n, width]``, ``uses`` ``[n]`` (calls that looked each up) and
        ``waiting`` ``[m, 3]`` (:meth:`.id_map.IdMap.waiting`)."""
        with self._lock:
            ids, slots, uses = self.ids.items()
            return {"ids": ids, "rows": self._rows[0].index_select(0, slots), "uses": uses, "waiting": self.ids.waiting()}

    def served(self) -> tuple[Tensor, Tensor]:
        """``(ids, rows)`` as they are served: ids ascending, and after their rows that of what is left out and the default row."""
        with self._lock:
            ids, slots, _ = self.ids.items()
            ids, order = ids.sort()
            return ids, self._rows[0].index_select(0, torch.cat([slots[order], torch.tensor([self.home, self.home + 1])]))

    def load(self, ids: Tensor, rows: Tensor, uses: Tensor | None = None, waiting: Tensor | None = None) -> None:
        """Hold exactly ``ids`` ``[n]`` with ``rows`` ``[n, width]`` from now on; what else a row holds starts anew. Gradients under way are
        void. Raises :class:`IdMapError`, and nothing changes, where they do not fit: more ids than the capacity, one twice, other widths."""
        if not isinstance(ids, Tensor) or not isinstance(rows, Tensor):
            raise IdMapError(f"table '{self.name}': ids and rows are {type(ids).__name__} and {type(rows).__name__}; tensors were needed")
        wanted = (ids.numel(), self.parts[0].width)
        if ids.dim() != 1 or tuple(rows.shape) != wanted or ids.dtype != torch.int64:
            raise IdMapError(f"table '{self.name}': ids are {ids.dtype} {tuple(ids.shape)} and rows {tuple(rows.shape)}; int64 [n] and [n, {wanted[1]}] were needed")
        uses = torch.ones(ids.numel(), dtype=torch.int64) if uses is None else uses
        waiting = torch.empty(0, 3, dtype=torch.int64) if waiting is None else waiting
        if not all(isinstance(t, Tensor) for t in (uses, waiting)) or any(t.is_meta for t in (ids, rows, uses, waiting)):
            raise IdMapError(f"table '{self.name}': uses and waiting must be tensors, and none on the meta device")
        if uses.shape != ids.shape or waiting.dim() != 2 or waiting.shape[1] != 3:
            raise IdMapError(f"table '{self.name}': uses are {tuple(uses.shape)} and waiting {tuple(waiting.shape)}; {tuple(ids.shape)} and [m, 3] were needed")
        if bool((uses < 1).any()) or bool((waiting[:, 1] < 1).any()):
            raise IdMapError(f"table '{self.name}': some ids were used or seen less than once")
        with self._lock:
            try:
                self.ids.load(ids, uses, waiting)
            except IdMapError as error:
                raise IdMapError(f"table '{self.name}': {error}") from None
            self._due.clear()
            self._looked.clear()
            slots = torch.arange(ids.numel())
            self._rows[0][: ids.numel()] = rows.detach().to(torch.float32)
            torch.autograd.graph.increment_version(self.memory)
            self._start(ids, slots, first=1)

    def load_part(self, part: int, ids: Tensor, values: Tensor) -> None:
        """Set what an optimizer keeps for rows, ``values`` ``[n, width]`` for ``ids`` ``[n]``. Raises :class:`IdMapError`, and nothing changes,
        where those are not exactly the ids that have a row."""
        with self._lock:
            held, slots, _ = self.ids.items()
            held, order = held.sort()
            ids, given = ids.sort()
            if not torch.equal(held, ids) or tuple(values.shape) != (ids.numel(), self.parts[part].width):
                raise IdMapError(
                    f"table '{self.name}': the optimizer's state {tuple(values.shape)} is of {ids.numel()} ids, which are not the {held.numel()} that "
                    "have a row: load the model's state_dict first, and one that was saved at the same time"
                )
            self._rows[part].index_copy_(0, slots[order], values.detach().to(torch.float32)[given])

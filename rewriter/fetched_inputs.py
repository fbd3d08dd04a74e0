"""Tables with a cache on a device, in ``tw.pipeline``: fetching their rows in several threads, from ids that are on the host still, and telling
them that the model is called with the very tensors that this was done for.

Ids that the graph makes of inputs alone can be made on the host, before the inputs are copied to the device. When the loop then calls the
model with the same tensors, not written since, for the first time, its lookups take what was fetched for that batch; else they compare ids
first, for which the host waits for the device. Both give the same rows.
"""
from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from ..kernels.tiers.device import DeviceTable
from ..kernels.tiers.table import SlotTable, table_of
from .staleness import Lookups
from .variant import Variant

_THREADS = 16
_PIPELINES = 1 << 20
_pipelines = itertools.count()


def runs_on_host(graph: Graph) -> bool:
    """Whether a graph of ids needs nothing but its inputs, so that it runs where they are."""
    return all(n.op in ("placeholder", "output") or (n.op == "call_function" and "device" not in n.kwargs) for n in graph.nodes)


def on_host(inputs: Sequence[Any]) -> bool:
    """Whether all tensors of ``inputs`` are on the CPU."""
    return all(not isinstance(x, Tensor) or x.is_cpu for x in inputs)


class FetchedInputs:
    """For one pipeline over a model; does nothing where no table has its cache on a device."""

    def __init__(self, tables: Sequence[SlotTable]) -> None:
        self._own = next(_pipelines) % _PIPELINES
        self.tables = [t for t in tables if isinstance(t, DeviceTable)]
        self._coming: dict[int, Lookups] = {}  # by batch
        self._now: Lookups | None = None
        self._runs: list[tuple[Variant, Callable]] = []
        self._workers = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, len(self.tables)), "tablewright fetch") if len(self.tables) > 1 else None

    def expect(self, batch: int, variant: Variant, inputs: list) -> None:
        """The rows of ``batch`` will be fetched for a call of ``variant`` with ``inputs`` as they are now."""
        if self.tables:
            self._coming[batch] = Lookups(batch, batch, variant, inputs, "")

    def prefetch(self, numbers: Sequence[int], ids: Sequence[Tensor], batch: int) -> None:
        """Have tables fetch the rows of ``batch``, each in the order of its lookups; raises what the first that fails raises."""
        by_table: dict[int, list[Tensor]] = {}
        for number, each in zip(numbers, ids):
            by_table.setdefault(number, []).append(each)

        def one(number: int) -> None:
            table = table_of(number)
            for each in by_table[number]:
                table.prefetch(each, self._number(table, batch))

        if self._workers is None:
            for number in by_table:
                one(number)
            return
        grad = torch.is_grad_enabled()

        def in_worker(number: int) -> None:
            with torch.set_grad_enabled(grad):
                one(number)

        started = [self._workers.submit(in_worker, number) for number in by_table]
        errors = [e for each in started if (e := each.exception()) is not None]
        if errors:
            raise errors[0]

    def _of_device(self, batch: int) -> int:
        return batch * _PIPELINES + self._own  # no other pipeline's batch

    def _number(self, table: SlotTable, batch: int) -> int:
        """What ``batch`` is called in ``table``; those that compare ids with what was prefetched need no more than its place."""
        return self._of_device(batch) if isinstance(table, DeviceTable) else batch

    def hand_out(self, batch: int, tables: Sequence[SlotTable]) -> None:
        """The loop gets ``batch``: what was prefetched in ``tables`` for batches before it is let go."""
        for table in tables:
            table.drop_before(batch * _PIPELINES if isinstance(table, DeviceTable) else batch)
        now = self._now = self._coming.pop(batch, None)
        if now is not None and now.variant is not None and all(v is not now.variant for v, _ in self._runs):
            self._wrap(now.variant)

    def _wrap(self, variant: Variant) -> None:
        plain = variant.run
        self._runs.append((variant, plain))
        variant.run = lambda *given: self._run(variant, plain, given)

    def _run(self, variant: Variant, plain: Callable, given: tuple) -> tuple:
        now, batch = self._now, None
        if now is not None and now.fit(variant, given):
            self._now = None  # a call that fails may leave some of its lookups' rows to the next
            batch = self._of_device(now.number)
        for table in self.tables:
            table.known = batch
        try:
            return plain(*given)
        finally:
            for table in self.tables:
                table.known = None

    @contextmanager
    def running(self):
        """While the pipeline is iterated over."""
        try:
            yield
        finally:
            for variant, plain in self._runs:
                variant.run = plain
            self._runs.clear()
            self._now = None
            self._coming.clear()
            if self._workers is not None:
                self._workers.shutdown(wait=False)

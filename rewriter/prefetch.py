"""``tw.pipeline(loader, opt)``: the rows of the next batches come while the present one computes.

A thread takes batches from the loader, runs the part of the model's graph that makes ids (``passes/ids_ahead.py``) and fetches their rows
into the caches of tables in tiers; the training loop gets each batch when its rows are there. Exact: a row that a batch under way will
change is the same slot for the next one, which reads it after the update, and rows that are waited for do not leave.
"""
from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.packed_copy import Arriving
from ..kernels.tiers.device import DeviceTable
from ..kernels.tiers.table import TieredTable
from ..passes.ids_ahead import ids_ahead
from .capture.data_guard import asserted
from .errors import PlanError
from .fetched_inputs import FetchedInputs, on_host, runs_on_host
from .input_copies import InputCopies
from .optimized_model import OptimizedModel
from .staleness import Lookups, StaleLookups
from .variant import Variant, runnable

_END = object()
_PATIENCE = 5.0  # seconds that a loop that ends early waits for a loader that is at work


@dataclass
class PipelineReport:
    """``batches`` given out, ``ahead`` of them with their rows fetched before. Seconds: ``loading`` (the loader), ``fetching`` (ids and
    rows), ``looking`` (lookups run ahead), ``waiting`` (the training loop, for any of these). ``hits`` and ``misses``: rows that were wanted
    and found in the caches of tables in tiers, or not; ``copied``: bytes of inputs that went to the GPU. With ``staleness``: ``looked_ahead`` batches had their lookups run ahead, ``latest``
    updates late at most, :attr:`mean_lateness` on average over all batches. ``not_ahead``: why anything was not done ahead, "" where it was."""

    batches: int = 0
    ahead: int = 0
    loading: float = 0.0
    fetching: float = 0.0
    waiting: float = 0.0
    not_ahead: str = ""
    looking: float = 0.0
    hits: int = 0
    misses: int = 0
    copied: int = 0
    staleness: int = 0
    looked_ahead: int = 0
    latest: int = 0
    lateness: int = 0  # the sum over batches

    @property
    def hidden(self) -> float:
        """The part of the loading, fetching and looking time that the training loop did not wait for, 0 to 1."""
        return max(0.0, 1 - self.waiting / max(1e-12, self.loading + self.fetching + self.looking))

    @property
    def mean_lateness(self) -> float:
        """By how many updates the lookups of a batch were late, on average."""
        return self.lateness / max(1, self.batches)

    def __str__(self) -> str:
        said = f"{self.batches} batches, {self.ahead} with their rows fetched ahead; loading {self.loading:.2f} s, fetching {self.fetching:.2f} s, "
        said += f"looking up {self.looking:.2f} s, " if self.staleness else ""
        said += f"waited {self.waiting:.2f} s ({self.hidden:.0%} hidden)"
        if self.hits + self.misses:
            said += f"; {self.hits / (self.hits + self.misses):.1%} of {self.hits + self.misses:,} rows were in the caches"
        if self.copied:
            said += f"; {self.copied / 1e6:,.1f} MB of inputs went to the GPU, in one copy a batch"
        if self.staleness:
            said += f"; {self.looked_ahead} batches looked up ahead, {self.latest} updates late at most (of {self.staleness} allowed), {self.mean_lateness:.2f} on average"
        return said + (f"; {self.not_ahead}" if self.not_ahead else "")


class Pipeline:
    """See :func:`pipeline`. Iterate over it; ``report`` says how it went."""

    def __init__(self, loader: Iterable[Any], model: OptimizedModel, inputs: Callable[[Any], Any] | None, prefetch: int) -> None:
        self.loader, self.model, self.inputs, self.prefetch = loader, model, inputs, prefetch
        self._report, self._started = PipelineReport(), None
        self._copies = InputCopies(model)
        self._ahead: dict[int, tuple[Callable, list[int], str, bool]] = {}  # by the variant's id

    @property
    def report(self) -> PipelineReport:
        """Of the last iteration, as far as it is."""
        self._count()
        return self._report

    def _count(self) -> None:
        """Report what the tables counted since the iteration began: not at every batch, where it costs the loop time."""
        if self._started is not None:
            report, now = self._report, _counts(self._tables)
            report.hits, report.misses, looked = (b - a for a, b in zip(self._started, now))
            report.waiting, self._started = report.waiting + looked, (*self._started[:2], now[2])

    def __iter__(self) -> Iterator[Any]:
        report = self._report = PipelineReport(staleness=self.model.plan.pipeline.staleness)
        # both ways in C, without a lock that the other thread may hold: batches, and for each that may be made a token
        given, room = queue.SimpleQueue(), queue.SimpleQueue()
        for _ in range(self.prefetch):
            room.put(None)
        stop = threading.Event()
        grad = torch.is_grad_enabled()
        loading = [False]
        tables = self._tables = [] if self.model._tiered is None else list(self.model._tiered.files.values())
        self._started = _counts(tables)
        fetched_inputs = self._fetched_inputs = FetchedInputs(tables)
        stale = StaleLookups(self.model, report.staleness, report) if report.staleness else None
        thread = threading.Thread(target=self._work, args=(given, room, stop, grad, loading), name="tablewright prefetch", daemon=True)
        thread.start()
        window: deque[tuple[Any, int, Any, Lookups | None]] = deque()  # the batch to come, and those that are looked up ahead of it
        asked, ended = 0, False
        waits = bool(tables) and stale is None
        owed: deque[None] = deque()  # tokens for the thread: it begins when the loop has looked up, and not where both want Python's lock

        def give() -> None:
            try:
                room.put(owed.pop())
            except IndexError:
                return

        for table in tables:
            table.looked = give
        try:
            with fetched_inputs.running(), nullcontext() if stale is None else stale.running():
                while True:
                    give()
                    started = time.perf_counter()
                    while not ended and len(window) <= report.staleness:
                        kind, number, value, fetched = given.get()
                        (owed.append if waits else room.put)(None)
                        ended = kind is not None
                        if not ended:
                            value, arriving = value
                            if arriving is not None:
                                arriving.join()
                        window.append((kind, number, value, stale.start(number, asked, *fetched) if stale and not ended else None))
                    kind, number, value, looked = window.popleft()
                    if stale is not None and looked is not None:
                        stale.hand_out(looked)
                    report.waiting += time.perf_counter() - started
                    if kind is not None:
                        if stale is not None:
                            stale.settle()
                        if kind is _END:
                            return
                        raise value
                    report.batches += 1
                    fetched_inputs.hand_out(number, tables)
                    yield value
                    asked = number + 1
        finally:
            stop.set()
            room.put(None)  # it may wait for one
            late = time.monotonic() + _PATIENCE
            while thread.is_alive() and not (loading[0] and time.monotonic() > late):  # else the loader blocks: when it returns, the thread ends and fetches nothing
                thread.join(0.01)
            for table in tables:
                if table.looked is give:
                    table.looked = None
                table.drop_before(None)
            if report is self._report:
                self._count()
                self._started = None

    def _work(self, given: queue.SimpleQueue, room: queue.SimpleQueue, stop: threading.Event, grad: bool, loading: list[bool]) -> None:
        report = self._report
        try:
            batches = iter(self.loader)
            number = 0
            while not stop.is_set():
                started = time.perf_counter()
                loading[0] = True
                batch = next(batches, _END)
                loading[0] = False
                if stop.is_set():
                    return
                loaded = time.perf_counter()
                report.loading += loaded - started
                if batch is _END:
                    given.put((_END, number, None, None))
                    return
                host, arriving = batch, None
                if self._copies.device is not None:
                    batch, arriving = self._copies.start(batch)
                with torch.set_grad_enabled(grad):
                    fetched = self._fetch(batch, number, host, arriving)
                report.copied += 0 if arriving is None else arriving.bytes
                report.fetching += time.perf_counter() - loaded
                room.get()
                given.put((None, number, (batch, arriving), fetched))
                number += 1
        except BaseException as error:  # noqa: B036 - it is raised where the loop takes its next batch
            given.put((BaseException, -1, error, None))

    def _fetch(self, batch: Any, number: int, host: Any, arriving: Arriving | None) -> tuple[Variant | None, list, str]:
        """Bring the rows of a batch, which was ``host`` before it was copied to a device. Returns the form of the model that it fits, its inputs, and why there is none."""
        report = self._report
        if not self._tables and not report.staleness:
            report.not_ahead = "no table is in tiers"
            return None, [], ""
        args, kwargs = self._arguments(batch)
        forms = [v for v in self.model._variants if v.captured.entry == "forward"]
        variant = next((v for v in forms if v.captured.program is None and v.captured.guards.failure(args, kwargs) is None), None)
        if variant is None:
            why = "some batches fit no captured form of the model (inputs= says which part of a batch the model takes)"
            if any(v.captured.program is not None for v in forms):
                why = "the model, or a form of it, runs in pieces or plainly"
            report.not_ahead = why
            return None, [], why
        inputs = list(variant.captured.guards.flatten(args, kwargs))
        run, numbers, why, anywhere = self._of(variant)
        if why:
            report.not_ahead = why
            return None, [], why
        if numbers:
            self._fetched_inputs.expect(number, variant, inputs)
            made_of = inputs
            if arriving is not None:
                args, kwargs = self._arguments(host)
                made_of = list(variant.captured.guards.flatten(args, kwargs))
                if not anywhere or not on_host(made_of):
                    made_of = inputs
                    arriving.join()
            with torch.no_grad():
                ids = run(*made_of)
            self._fetched_inputs.prefetch(numbers, ids, number)
            report.ahead += 1
        return variant, inputs, ""

    def _arguments(self, batch: Any) -> tuple[tuple, dict]:
        taken = batch if self.inputs is None else self.inputs(batch)
        if isinstance(taken, dict):
            return (), taken
        return (tuple(taken), {}) if isinstance(taken, (tuple, list)) else ((taken,), {})

    def _of(self, variant: Variant) -> tuple[Callable, list[int], str, bool]:
        """What makes the ids of a form of the model, their tables, why there is nothing of it, and whether it runs wherever its inputs are."""
        found = self._ahead.get(id(variant))
        if found is None:
            graph, numbers, why = ids_ahead(variant.graph)
            if not why and asserted(variant.graph):
                why = "the model looks at data, and which of its graphs serves a batch shows when it runs"
            found = (runnable(self.model._shell, graph) if not why else lambda *_: (), numbers, why, runs_on_host(graph))
            self._ahead[id(variant)] = found
        return found


def _counts(tables: list[TieredTable]) -> tuple[int, int, float]:
    """Rows found in the caches and not, and seconds that lookups waited for them."""
    counted = [t.cache.counters() for t in tables]
    return sum(c.hits for c in counted), sum(c.misses for c in counted), sum(t.waited for t in tables)


def pipeline(loader: Iterable[Any], model: OptimizedModel, *, inputs: Callable[[Any], Any] | None = None, prefetch: int | None = None) -> Pipeline:
    """Iterate over ``loader`` with the rows of up to ``prefetch`` batches (by default the plan's ``pipeline.prefetch``) fetched ahead: ``for
    dense, ids, y in tw.pipeline(loader, opt, inputs=lambda batch: batch[:2]): ...`` is the plain loop, with the same results, unless the plan
    allows ``staleness``: then the lookups of a batch run up to so many batches before it (``staleness.py``), where the model is called with
    the very tensors that ``inputs`` gives.

    ``inputs``: from a batch to the model's arguments (a tuple of positional ones, a mapping of keyword ones, or one tensor); by default the
    batch itself. Where the model is on a GPU, tensors of a batch that are not arrive there, all in one copy (``input_copies.py``). The loader
    runs in a thread of its own; what it raises is raised at the batch it raised it for. The cache must hold the rows of ``prefetch`` +
    staleness + 2 batches. Raises :class:`PlanError` for a model that ``optimize`` did not return, and for ``prefetch`` below 1.
    """
    if not isinstance(model, OptimizedModel):
        raise PlanError(f"pipeline() takes the model that optimize() returned, not {type(model).__name__}")
    prefetch = model.plan.pipeline.prefetch if prefetch is None else prefetch
    if type(prefetch) is not int or prefetch < 1:
        raise PlanError(f"prefetch is {prefetch!r}; it must be a number of batches, 1 or more")
    if model.plan.pipeline.staleness and model._sharded is not None:
        raise PlanError(
            f"pipeline.staleness is {model.plan.pipeline.staleness} and the model runs over several ranks, whose exchanges have one order on all of them: "
            "lookups cannot run ahead in a thread there. Say staleness: 0"
        )
    on_device = next((n for n, t in (model._tiered.files if model._tiered is not None else {}).items() if isinstance(t, DeviceTable)), None)
    if model.plan.pipeline.staleness and on_device is not None:
        raise PlanError(f"pipeline.staleness is {model.plan.pipeline.staleness} and table '{on_device}' has its cache on a device, for which lookups are not run ahead. Say staleness: 0")
    return Pipeline(loader, model, inputs, prefetch)

"""``pipeline: {staleness: k}``: the lookups of a batch run k batches before it, beside the dense part of the batches between.

When the loop asks for batch n, every update of batches before n is done; then, in a thread, the lookups of batch n + k run. They are over
before the first update of batch n begins, which waits for them, so that they see the updates of batches before n, all of them and no
others: batch n + k is looked up ``k`` updates late, and the first k batches less. Two runs give the same bits. The dense part, its
gradients and its optimizer are synchronous, and so are the gradients of rows, which are applied to the rows as they are then.
"""
from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..kernels.embedding.given import Given
from ..passes.split_lookups import Split, split_lookups
from .capture.data_guard import asserted
from .optimized_model import OptimizedModel
from .variant import Variant, runnable


class Lookups:
    """The lookups of one batch. ``late``: how many updates they are behind; ``reason``: why they were not run ahead, "" where they are."""

    def __init__(self, number: int, asked: int, variant: Variant | None, inputs: list, reason: str) -> None:
        self.number, self.late, self.variant, self.inputs, self.reason = number, number - asked, variant, inputs, reason
        self.versions = [x._version if isinstance(x, Tensor) else 0 for x in inputs]
        self.future: Future | None = None
        self.used = False

    def fit(self, variant: Variant, inputs: tuple) -> bool:
        """Whether the model is called with what was looked up for: the same tensors, not written since."""
        same = variant is self.variant and len(inputs) == len(self.inputs) and all(a is b for a, b in zip(inputs, self.inputs))
        return same and self.versions == [x._version if isinstance(x, Tensor) else 0 for x in inputs]


class _Run:
    """In place of ``variant.run`` while pipelines with staleness run."""

    def __init__(self, variant: Variant, shell: Any) -> None:
        self.variant, self.plain, self.lines = variant, variant.run, []
        split = split_lookups(variant.graph, shell) if not asserted(variant.graph) else None
        self.split: Split | None = split
        self.reason = "the model looks at data, and which of its graphs serves a batch shows when it runs" if split is None else "; ".join(split.left)
        if split is not None and split.launches:
            self.ahead, self.rest = runnable(shell, split.ahead), runnable(shell, split.rest)

    def __call__(self, *inputs: Any) -> tuple:
        for line in self.lines:
            now = line.now
            if now is not None and now.future is not None and now.fit(self.variant, inputs):
                now.used = True
                return self.rest(*inputs, *now.future.result())
        for line in self.lines:
            line.wait()  # an update may come of what is looked up here
        return self.plain(*inputs)


    def wait(self) -> None:
        """Until nothing reads tables ahead."""
        for line in self.lines:
            line.wait()


class StaleLookups:
    """Those of one pipeline. ``report`` is its :class:`~.prefetch.PipelineReport`."""

    def __init__(self, model: OptimizedModel, staleness: int, report: Any) -> None:
        self.model, self.staleness, self.report = model, staleness, report
        self.now: Lookups | None = None
        self._last: Future | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tablewright lookups")
        self._runs: list[_Run] = []

    @contextmanager
    def running(self):
        """While the pipeline is iterated over. Updates by optimizers wait for lookups under way, too."""
        optimizers = [self.model.embedding_optimizer, self.model._compiler.user_optimizer and self.model._compiler.user_optimizer()]
        guards = {id(g): g for g in (self.model._guard, getattr(optimizers[0], "guard", None)) if hasattr(g, "waits")}
        for guard in guards.values():
            guard.waits.append(self.wait)
        hooks = [o.register_step_pre_hook(lambda *_: self.wait()) for o in optimizers if o is not None]
        try:
            yield
        finally:
            self._worker.shutdown(wait=True, cancel_futures=True)
            for hook in hooks:
                hook.remove()
            for guard in guards.values():
                guard.waits.remove(self.wait)
            for run in self._runs:
                run.lines.remove(self)
                if not run.lines and run.variant.run is run:
                    run.variant.run = run.plain

    def start(self, number: int, asked: int, variant: Variant | None, inputs: list, why: str) -> Lookups:
        """Begin the lookups of batch ``number``; the loop asks for batch ``asked``, so that all updates before that are done."""
        run = None if variant is None else self._run_of(variant)
        if run is not None and (run.split is None or not run.split.launches):
            why, run = why or run.reason or "the model has no fused lookups", None
        made = Lookups(number, asked, variant, inputs, why)
        if made.late > self.staleness:
            raise RuntimeError(f"the lookups of batch {number} would be {made.late} updates late; {self.staleness} are allowed")
        if run is not None:
            made.reason = run.reason
            self._last = made.future = self._worker.submit(self._read, run, number, inputs)
        return made

    def _run_of(self, variant: Variant) -> _Run:
        run = variant.run if isinstance(variant.run, _Run) else None
        if run is None:
            run = variant.run = _Run(variant, self.model._shell)
        if not any(line is self for line in run.lines):
            run.lines.append(self)
            self._runs.append(run)
        return run

    def _read(self, run: _Run, number: int, inputs: list) -> list[Given]:
        started = time.perf_counter()
        with torch.no_grad():
            made = [Given(slots, self.wait) for slots in run.ahead(*inputs, number)]
        self.report.looking += time.perf_counter() - started
        return made

    def wait(self) -> None:
        """Until nothing reads tables ahead."""
        last = self._last
        if last is not None and not last.done():
            started = time.perf_counter()
            last.exception()
            self.report.waiting += time.perf_counter() - started

    def hand_out(self, lookups: Lookups) -> None:
        """``lookups`` are of the batch that the loop gets now; raises what they raised."""
        self.settle()
        if lookups.future is not None:
            lookups.future.result()
        self.now = lookups

    def settle(self) -> None:
        """Count the batch that the loop is done with."""
        done, self.now = self.now, None
        if done is None:
            return
        late = done.late if done.used else 0
        self.report.looked_ahead += done.used
        self.report.latest = max(self.report.latest, late)
        self.report.lateness += late
        if done.reason or not done.used:
            self.report.not_ahead = done.reason or "the model was not called with the tensors of some batches (inputs= says which part of a batch it takes)"



"""Averages the gradients of parameters that every rank holds, as DistributedDataParallel does, while the backward runs.

Dense gradients travel in buckets: when all of a bucket are there its all-reduce starts, in the same order on all ranks, and the
backward goes on; when it ends, what is left over is sent and everything is waited for. A parameter that no rank gave a gradient keeps
``None``. Sparse gradients (of whole tables) are gathered when the backward ends, and rows that several ranks touched are added.

Between two ranks each sends the other its gradients and both add them up: as many bytes as an all-reduce, in half its steps (2.5 of 7 processor
ms less for 9 MB; the same bits on both). Weights' gradients are written straight into their bucket by the products that can (``dense/gradient_places.py``).

Averages are linear, so gradients that accumulate over several backwards come out right: what was averaged before is equal everywhere.
"""
from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dense import gradient_places
from . import native
from .errors import lost_peer
from .work import all_to_all, finish, group_of

# Every collective wakes gloo's threads some ten times, which take the processors from the backward: with buckets of 1 MiB a step of DLRM
# (9 MB of gradients, two ranks on two cores) takes 5 processor ms more by all-reduces, 1 more by exchanges of two.
BUCKET_BYTES = 4 << 20


@dataclass
class _Bucket:
    params: list[Tensor]
    waiting: set[int] = field(default_factory=set)  # places of parameters without a gradient yet
    flat: Tensor | None = None  # what is being reduced: the gradients, then for each whether it was there
    other: Tensor | None = None  # the same of the other rank, of two
    work: Any = None

    def parts(self) -> tuple[Tensor, ...]:
        """Of ``flat``: the place of each gradient, flat, then that of the flags."""
        if self.flat is None:
            self.flat = self.params[0].new_empty(sum(p.numel() for p in self.params) + len(self.params))
        return self.flat.split([*(p.numel() for p in self.params), len(self.params)])

    @property
    def summed_first(self) -> bool:
        """Can gradients be added before they are divided? (Of float16 the sum may be too large.)"""
        return self.params[0].is_cpu and self.params[0].dtype != torch.float16


class _Backward:
    """A backward that runs."""


class GradientAverage:
    """``dense`` and ``sparse``: parameters by the kind of gradient they get, in the same order on all ranks. ``group``: a process
    group of their own, so that their collectives mix with no others. ``done``: called with the parameters of ``sparse`` that have a
    gradient, when a backward has ended."""

    def __init__(self, dense: Sequence[Tensor], sparse: Sequence[Tensor], group: str, done: Callable[[list[Tensor]], None] | None = None):
        self.sparse, self.group, self.done = list(sparse), group, done
        self.process_group = group_of(group)
        self.world = dist.get_world_size(self.process_group)
        self.buckets = _buckets(dense)
        self._next = 0  # the bucket whose turn it is
        self._running = False
        self._backward: Callable[[], _Backward | None] = lambda: None
        self._places = {id(p): (b, i) for b, bucket in enumerate(self.buckets) for i, p in enumerate(bucket.params)}
        self._reset()
        mine = weakref.ref(self)
        self._hooks = [p.register_post_accumulate_grad_hook(_hook(mine)) for p in [*dense, *self.sparse]]
        self._finalizer = weakref.finalize(self, _remove, self._hooks)

    def _reset(self) -> None:
        self._next, self._running, self._ending = 0, False, False
        self._watched: tuple[int, int] | None = None  # the place of a parameter whose other hooks have still to run
        for bucket in self.buckets:
            gradient_places.withdraw(bucket.params)
            bucket.waiting, bucket.flat, bucket.other, bucket.work = set(range(len(bucket.params))), None, None, None

    def begin(self) -> None:
        """Be there when the running backward ends; called by whatever sees it first."""
        if self._running and (self._ending or self._backward() is None):  # an earlier backward ended in an error
            self._reset()
        if not self._running:
            self._running = True
            # Held by the callback alone, which a backward that fails half-way takes with it.
            backward = _Backward()
            self._backward = weakref.ref(backward)
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._finish, backward))
            self._offer()

    def _offer(self) -> None:
        """Places for the gradients that products can write there. Who watches a gradient (a hook) may keep it: it stays this rank's own."""
        for bucket in self.buckets:
            if bucket.params[0].is_cpu and bucket.params[0].dtype == torch.float32:
                for param, part in zip(bucket.params, bucket.parts()):
                    if param.dim() == 2 and param.grad is None and not param._backward_hooks and not _is_watched(param):
                        gradient_places.offer(param, part.view(param.shape))

    def ready(self, param: Tensor) -> None:
        """``param`` has its gradient of this backward. Where it has hooks of others they run before it travels, as under
        DistributedDataParallel: what they see is this rank's own, and what they change counts."""
        self.begin()
        place, watched = self._places.get(id(param)), self._watched
        self._watched = place if place is not None and _is_watched(param) else None
        for there in (watched, place if self._watched is None else None):
            if there is not None:
                self._there(there)

    def _there(self, place: tuple[int, int]) -> None:
        self.buckets[place[0]].waiting.discard(place[1])
        while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
            self._start(self.buckets[self._next])
            self._next += 1

    def _start(self, bucket: _Bucket) -> None:
        like = bucket.params[0]
        *parts, flags = bucket.parts()
        flags.copy_(torch.tensor([p.grad is not None for p in bucket.params], dtype=like.dtype))
        pair = self.world == 2 and bucket.summed_first
        for param, part in zip(bucket.params, parts):
            if param.grad is None:
                part.zero_()
                continue
            grad = param.grad.detach()
            grad = grad.to_dense() if grad.is_sparse else grad
            place = part.view(grad.shape)
            if pair:
                if grad.data_ptr() != place.data_ptr():
                    place.copy_(grad)
            else:  # divided before they are added, as DistributedDataParallel does
                torch.mul(grad, 1.0 / self.world, out=place)
        flat = bucket.flat
        assert flat is not None
        try:
            if pair:
                to_other = [0 if rank == dist.get_rank(self.process_group) else flat.numel() for rank in range(2)]
                bucket.other = torch.empty_like(flat)
                bucket.work = dist.all_to_all_single(bucket.other, flat, to_other, to_other, group=self.process_group, async_op=True)
            elif self.world > 1:
                bucket.work = dist.all_reduce(flat, group=self.process_group, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: BaseException):
        return lost_peer("the averaging of gradients", dist.get_rank(self.process_group), self.world, error)

    @torch.no_grad()
    def _finish(self, _: _Backward) -> None:
        self._ending = True
        for bucket in self.buckets[self._next :]:
            self._start(bucket)
        # Who else works when the backward ends (updates of tables) does so while the last bucket travels.
        torch.autograd.Variable._execution_engine.queue_callback(self._complete)

    @torch.no_grad()
    def _complete(self) -> None:
        try:
            for bucket in self.buckets:
                self._store(bucket)
            reached = self._gather()
        finally:
            self._reset()
        if self.done is not None:
            self.done(reached)

    def _store(self, bucket: _Bucket) -> None:
        if bucket.work is not None:
            try:
                bucket.work.wait()
            except RuntimeError as error:
                raise self._lost(error) from error
        assert bucket.flat is not None
        flat = bucket.flat
        if bucket.other is not None:
            native.mean(flat, bucket.other)
        there = flat[flat.numel() - len(bucket.params) :].tolist()
        at = 0
        for param, held in zip(bucket.params, there):
            mean = flat[at : at + param.numel()].view(param.shape)
            at += param.numel()
            if held:
                param.grad = mean  # a view of the bucket: no copy

    def _gather(self) -> list[Tensor]:
        """Add up the sparse gradients of all ranks; the parameters that now have one."""
        if self.world > 1 and self.sparse:
            for dtype in dict.fromkeys(p.dtype for p in self.sparse):
                self._gather_of([p for p in self.sparse if p.dtype == dtype])
        return [p for p in self.sparse if p.grad is not None]

    def _gather_of(self, params: list[Tensor]) -> None:
        device = params[0].device
        grads = [None if p.grad is None else p.grad.coalesce() if p.grad.is_sparse else p.grad.to_sparse(1).coalesce() for p in params]
        rows = [torch.empty(0, dtype=torch.int64, device=device) if g is None else g._indices()[0] for g in grads]
        values = [p.new_empty(0, p.shape[1]) if g is None else g._values() for p, g in zip(params, grads)]
        mine = torch.tensor([r.numel() if g is not None else -1 for r, g in zip(rows, grads)], device=device)
        sizes = finish(self._to_all(mine, [len(params)] * self.world)).view(self.world, -1).tolist()
        counts = [[max(n, 0) for n in sizes[r]] for r in range(self.world)]
        all_rows = self._to_all(torch.cat(rows), [sum(c) for c in counts])
        all_values = self._to_all(
            torch.cat([v.reshape(-1) for v in values]), [sum(n * p.shape[1] for n, p in zip(c, params)) for c in counts]
        )
        row_parts, value_parts = finish(all_rows).split([n for c in counts for n in c]), finish(all_values).split(
            [n * p.shape[1] for c in counts for n, p in zip(c, params)]
        )
        for i, param in enumerate(params):
            if all(sizes[r][i] < 0 for r in range(self.world)):
                continue
            places = [r * len(params) + i for r in range(self.world)]
            found = torch.cat([row_parts[k] for k in places])
            sums = torch.cat([value_parts[k].view(-1, param.shape[1]) for k in places])
            total = torch.sparse_coo_tensor(found.unsqueeze(0), sums, param.shape, check_invariants=False).coalesce()
            param.grad = torch.sparse_coo_tensor(
                total._indices(), total._values() / self.world, param.shape, is_coalesced=True, check_invariants=False
            )

    def _to_all(self, mine: Tensor, counts_in: list[int]) -> Tensor:
        """The same tensor to every rank."""
        return all_to_all(mine.repeat(self.world), [mine.numel()] * self.world, counts_in, self.group, "the gathering of table gradients")


def _hook(owner: weakref.ref):
    def ready(param: Tensor) -> None:
        average = owner()
        if average is not None:
            average.ready(param)

    return ready


def _is_watched(param: Tensor) -> bool:
    """Whether others than :class:`GradientAverage` are told when it has its gradient."""
    return len(param._post_accumulate_grad_hooks or ()) > 1  # type: ignore[attr-defined]


def _remove(hooks) -> None:
    for hook in hooks:
        hook.remove()


def _buckets(params: Sequence[Tensor]) -> list[_Bucket]:
    """In the order in which a backward makes gradients: last first. A bucket is of one dtype and device."""
    found: list[_Bucket] = []
    open_ones: dict[tuple, _Bucket] = {}
    for param in reversed(params):
        key = (param.dtype, param.device)
        bucket = open_ones.get(key)
        if bucket is None:
            bucket = open_ones[key] = _Bucket([])
            found.append(bucket)
        bucket.params.append(param)
        if sum(p.numel() * p.element_size() for p in bucket.params) >= BUCKET_BYTES:
            del open_ones[key]
    return found

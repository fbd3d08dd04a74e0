"""Collectives under way: which tensors are still being filled. ``start`` gives a tensor at once, ``finish`` waits for it.

The engine is torch.distributed (gloo on CPU, NCCL on GPU). On NCCL waiting means that the current stream waits, not Python.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .errors import lost_peer


@dataclass
class _Pending:
    work: Any
    kept: tuple[Tensor, ...]  # alive until the work is done
    what: str
    group: Any
    own: tuple[Tensor, Tensor] | None  # what this rank sends itself, and where it belongs


OWN_LEAST = 1 << 14  # elements of its own part that a rank copies itself
_pending: dict[int, _Pending] = {}  # by the storage that is being filled, which is kept, so that no other can have its place


def group_of(name: str) -> Any:
    """The process group by the name that graphs carry."""
    return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage]


def all_to_all(sent: Tensor, counts_out: list[int], counts_in: list[int], group: str, what: str) -> Tensor:
    """A flat tensor that will hold ``counts_in[r]`` elements from each rank ``r``; ``counts_out[r]`` of ``sent`` go to it."""
    if len(counts_out) == 1:
        return sent
    received = sent.new_empty(sum(counts_in))
    process_group = group_of(group)
    into, out, own, rank = received, sent, None, dist.get_rank(process_group)
    if len(counts_out) == 2 and sent.is_cpu and counts_out[rank] >= OWN_LEAST:
        # gloo would copy a rank's own part before it sends the other's; so it is copied while that travels.
        (into, home), (out, mine) = (_apart(flat, counts[0], rank) for flat, counts in ((received, counts_in), (sent, counts_out)))
        own = mine, home
        counts_in, counts_out = ([0 if r == rank else n for r, n in enumerate(counts)] for counts in (counts_in, counts_out))
    try:
        work = dist.all_to_all_single(into, out, counts_in, counts_out, group=process_group, async_op=True)
    except RuntimeError as error:
        raise lost_peer(what, rank, len(counts_in), error) from error
    _pending[_key(received)] = _Pending(work, (sent, received), what, process_group, own)
    return received


def _apart(flat: Tensor, first: int, rank: int) -> tuple[Tensor, Tensor]:
    """(the other rank's part, this rank's), where rank 0 has the ``first`` elements."""
    parts = flat[:first], flat[first:]
    return parts[1 - rank], parts[rank]


def finish(tensor: Tensor) -> Tensor:
    """Wait until ``tensor`` is there. Raises :class:`~.errors.PeerError` where a rank does not do its part."""
    pending = _pending.pop(_key(tensor), None)
    if pending is not None:
        if pending.own is not None:
            mine, home = pending.own
            home.copy_(mine)
        try:
            pending.work.wait()
        except RuntimeError as error:
            group = pending.group
            raise lost_peer(pending.what, dist.get_rank(group), dist.get_world_size(group), error) from error
    return tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

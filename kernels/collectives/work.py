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
    try:
        work = dist.all_to_all_single(received, sent, counts_in, counts_out, group=process_group, async_op=True)
    except RuntimeError as error:
        raise lost_peer(what, dist.get_rank(process_group), len(counts_in), error) from error
    _pending[_key(received)] = _Pending(work, (sent, received), what, process_group)
    return received


def finish(tensor: Tensor) -> Tensor:
    """Wait until ``tensor`` is there. Raises :class:`~.errors.PeerError` where a rank does not do its part."""
    pending = _pending.pop(_key(tensor), None)
    if pending is not None:
        try:
            pending.work.wait()
        except RuntimeError as error:
            group = pending.group
            raise lost_peer(pending.what, dist.get_rank(group), dist.get_world_size(group), error) from error
    return tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

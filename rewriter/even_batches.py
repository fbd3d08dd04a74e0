"""The end of an epoch where ranks have different numbers of batches: all stop together."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.collectives.errors import lost_peer
from .sharding import Ranks

T = TypeVar("T")


def even_batches(batches: Iterable[T], mesh: DeviceMesh) -> Iterator[T]:
    """Yields from ``batches`` for as long as every rank of ``mesh`` has one; what the others have left is dropped.

    A model over several ranks exchanges in every forward and backward, so a rank that stops earlier would leave the others waiting until
    the process group's timeout. One number a batch is reduced, a batch ahead, while the model runs. Raises
    :class:`~..kernels.collectives.errors.PeerError` where a rank stops without coming to the end.
    """
    group = Ranks.group_of(mesh)
    world = dist.get_world_size(group)
    rest = iter(batches)

    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def ask() -> tuple[list[T], torch.Tensor, Any]:
        batch = list(islice(rest, 1))
        missing = torch.tensor([0.0 if batch else 1.0], device=device)
        return batch, missing, dist.all_reduce(missing, group=group, async_op=True)

    following = ask()
    while True:
        batch, missing, work = following
        try:
            work.wait()
        except RuntimeError as error:
            raise lost_peer("the count of batches", dist.get_rank(group), world, error) from error
        if bool(missing):
            return
        following = ask()
        yield batch[0]

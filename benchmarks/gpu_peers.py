"""TorchRec's open Triton table-batched embeddings beside ours, where they can be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from gpu_bench import Bench

if TYPE_CHECKING:
    from gpu_ops import Bags

_told: list[str] = []


def _without(bench: Bench, why: str) -> None:
    if not _told:
        _told.append(why)
        bench.note(f"TorchRec's Triton TBE is not beside ours: {why}")


def torchrec_bags(bench: Bench, bags: Bags) -> tuple[Callable[[], object], Callable[[], object]] | None:
    """(forward, backward with the update fused) of TorchRec's module on tables of the same shapes and the same ids, or None and a note.

    Its weights are its own, filled alike. Rowwise AdaGrad, no stochastic rounding."""
    if bench.tiny:
        return None
    try:
        from torchrec.distributed.triton_tbe import triton_table_batched_embeddings as theirs

        module = theirs.TritonTableBatchedEmbeddingBags(
            [tuple(t.shape) for t in bags.tables], weights_precision=bags.dtype, output_dtype=bags.dtype, stochastic_rounding=False,
            learning_rate=0.01, eps=1e-8, optimizer=theirs.OptimType.EXACT_ROWWISE_ADAGRAD, device=bench.device,
        )  # fmt: skip
        indices = torch.cat(bags.ids).long()
        lengths = torch.cat([o.diff() for o in bags.offsets])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()
        made = module(indices, offsets)
        grad = torch.randn_like(made)
        made.backward(grad)
    except Exception as error:  # another version, no fbgemm_gpu, ...
        _without(bench, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None
    held: list[torch.Tensor] = []

    def backward() -> None:
        if not held:
            held.append(module(indices, offsets))
        held[0].backward(grad, retain_graph=True)

    return (lambda: module(indices, offsets)), backward

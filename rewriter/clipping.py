"""Clipping by the norm of all gradients: over sharded tables that norm is a sum over ranks, and table gradients are sparse.

``torch.nn.utils.clip_grad_norm_`` does not take sparse gradients, and of a sharded table's dense gradient it would see this rank's
block alone: every rank would clip by another factor, and none by the right one. So such a gradient refuses to tell a norm
(:class:`BlockGradient`), and :func:`clip_grad_norm_` is the way that is right, sharded or not.
"""
from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.collectives.errors import lost_peer
from .backward_steps import SteppedInBackward
from .errors import InBackwardError, PlanError
from .in_backward_guard import UpdatedInBackward

_WAY_OUT = "tablewright.clip_grad_norm_(opt, max_norm), called on every rank,"


class BlockGradient(Tensor):
    """The dense ``.grad`` of this rank's block of a sharded table: a tensor like others, but for its norm, which nobody wants."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if "norm" in name:
            raise PlanError(
                f"{name} was called on the gradient of a sharded table (by torch.nn.utils.clip_grad_norm_, say), of which this rank holds "
                f"a block: its norm is not the table's, and ranks would clip by different factors. {_WAY_OUT} takes the norm over all ranks"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def guard_block(param: Tensor) -> None:
    """From now on a dense gradient that a backward leaves on ``param`` is a :class:`BlockGradient`."""

    def mark(param: Tensor) -> None:
        if param.grad is not None and type(param.grad) is Tensor and not param.grad.is_sparse:
            param.grad = param.grad.as_subclass(BlockGradient)

    param.register_post_accumulate_grad_hook(mark)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
    """Scale the gradients of all parameters of an optimized model so that their norm, taken together, is at most ``max_norm``; the norm
    before that, a float64 scalar, equal on all ranks.

    As ``torch.nn.utils.clip_grad_norm_`` on the plain model's dense gradients, and of the same formula: each is multiplied by
    ``min(1, max_norm / (norm + 1e-6))``. Rows of sparse gradients that came in several parts are added up first. A sharded table counts
    with all of its blocks: one all-reduce of a number, so every rank calls this after its backward. ``norm_type``: positive, or ``inf``.

    Raises ``RuntimeError`` where the norm is not finite and ``error_if_nonfinite``; ``ValueError`` for another ``norm_type``;
    :class:`InBackwardError` where tables are updated inside the backward, which leaves nothing to clip; :class:`PeerError` where another
    rank does not call it."""
    if not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type}; it must be positive, or inf")
    inner = next((n for n, m in model.named_modules() if n and m.__dict__.get("_sharded") is not None), None)
    if inner is not None:
        raise PlanError(f"'{inner}' is spread over ranks, and clip_grad_norm_ was called on a module around it, where blocks of tables cannot be told from tables: pass what optimize() returned")
    tables = model.__dict__.get("_sharded")
    cut = set(tables.sharded()) if tables is not None else set()
    held: list[Tensor] = []
    norms: dict[bool, list[Tensor]] = {False: [], True: []}  # of what every rank holds; of what this rank alone holds
    for name, param in model.named_parameters():
        if param.grad is None:
            continue
        if isinstance(param.grad, UpdatedInBackward):
            if isinstance(param.grad, SteppedInBackward):
                raise InBackwardError(f"'{name}': {SteppedInBackward.refusal('clip_grad_norm_')}")
            raise InBackwardError(
                f"'{name}' is updated inside the backward, so its gradient is used up before it could be clipped. "
                "Set in_backward: false in the plan's embedding_optimizer, or clip opt.dense_parameters() only"
            )
        if param.grad.is_sparse and not param.grad.is_coalesced():
            param.grad = param.grad.coalesce()
        values = param.grad._values() if param.grad.is_sparse else param.grad.as_subclass(Tensor)
        held.append(values)
        if values.numel():
            norms[name in cut].append(torch.linalg.vector_norm(values, norm_type, dtype=torch.float64).cpu())
    ours, mine = (_together(norms[alone], norm_type) for alone in (False, True))
    if cut:
        ranks = tables.ranks
        said = torch.stack([mine.nan_to_num(0.0, math.inf), mine.isnan().double()])  # a maximum over ranks may lose a nan
        said = said.to("cuda" if dist.get_backend(ranks.averages) == "nccl" else "cpu")
        try:
            dist.all_reduce(said, dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=ranks.averages)
        except RuntimeError as error:
            raise lost_peer("the sum of gradients' norms", ranks.rank, ranks.world, error) from error
        mine = said[0].cpu() if not said[1] else torch.tensor(math.nan, dtype=torch.float64)
    total = float(torch.maximum(ours, mine) if math.isinf(norm_type) else (ours + mine) ** (1 / norm_type))
    if error_if_nonfinite and not math.isfinite(total):
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is {total}: nothing was clipped (error_if_nonfinite=True)")
    factor = max_norm / (total + 1e-6)
    for values in held:
        values.mul_(min(factor, 1.0) if not math.isnan(factor) else factor)
    return torch.tensor(total, dtype=torch.float64)


def _together(norms: list[Tensor], norm_type: float) -> Tensor:
    """The sum of their powers, or for ``inf`` the largest; nan where one is."""
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(norms).max() if math.isinf(norm_type) else torch.stack(norms).pow(norm_type).sum()

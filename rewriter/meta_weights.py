"""Models built on the meta device, over several ranks: weights are made where they will live, so no table is ever whole anywhere.

Tables are drawn as nn.Embedding draws them (``N(0, 1)``, the padding row zero), each rank its own block; all other modules by their own
``reset_parameters()``, as FSDP does, and then take rank 0's values. What the constructor drew otherwise is lost on the meta device: load
a checkpoint.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..kernels.collectives.spec import Shard
from .errors import PlanError

_TABLES = (nn.Embedding, nn.EmbeddingBag)


def make_dense(shell: nn.Module, optimizer: Optimizer | None) -> None:
    """Make all weights on the meta device that are not tables, in ``shell`` and in ``optimizer``.

    Raises :class:`PlanError` for a module that cannot make its own, and for a buffer whose values nobody knows any more."""
    made: dict[int, nn.Parameter] = {}
    for path, module in shell.named_modules():
        lost = next((n for n, b in module._buffers.items() if b is not None and b.is_meta), None)
        if lost is not None:
            raise PlanError(f"buffer '{f'{path}.{lost}'.lstrip('.')}' is on the meta device, so its values are unknown: build that module on the CPU")
        mine = {n: p for n, p in module._parameters.items() if p is not None and p.is_meta}
        if not mine or isinstance(module, _TABLES):
            continue
        if not callable(getattr(module, "reset_parameters", None)):
            raise PlanError(
                f"'{path or 'the model'}' ({type(module).__name__}) has parameter '{next(iter(mine))}' on the meta device and no "
                "reset_parameters() that could make it: build it on the CPU"
            )
        for name, param in mine.items():
            if id(param) not in made:
                made[id(param)] = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), requires_grad=param.requires_grad)
            module._parameters[name] = made[id(param)]
        module.reset_parameters()  # pyright: ignore[reportCallIssue]
    for group in optimizer.param_groups if optimizer is not None else ():
        for i, param in enumerate(group["params"]):
            if id(param) in made:
                group["params"][i] = made[id(param)]
                begin(optimizer, group, made[id(param)])
                optimizer.state.pop(param, None)


def draw(block: Tensor, shard: Shard, module: nn.Module) -> None:
    """Fill a block of a table as ``module`` draws its own."""
    with torch.no_grad():
        block.normal_()
        padding = getattr(module, "padding_idx", None)
        if padding is not None and shard.row <= padding < shard.row + shard.rows:
            block[padding - shard.row] = 0


def begin(optimizer: Optimizer | None, group: dict, param: Tensor) -> None:
    """The state that an optimizer makes when it is built (Adagrad alone does), for a parameter that came later."""
    if optimizer is not None and "initial_accumulator_value" in group:
        start = group["initial_accumulator_value"]
        optimizer.state[param] = {"step": torch.tensor(0.0), "sum": torch.full_like(param, start, requires_grad=False)}

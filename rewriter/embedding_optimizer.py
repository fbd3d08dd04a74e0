"""Decide who updates each table: the user's own optimizer (row by row where that is exact), the plan's, or nobody."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..kernels.embedding import in_backward
from ..kernels.embedding.optimizers import RowUpdates
from ..kernels.embedding.row_wise import why_not_row_wise
from ..passes.table_gradients import Choice
from .errors import PlanError
from .optimizer_plan import EmbeddingOptimizer
from .plan import Plan, TablePlan


@dataclass
class Updates:
    """``choices``: for each table, for the ``table_gradients`` pass. ``plan_optimizer``: the optimizer that the plan asks for."""

    choices: dict[str, Choice]
    plan_optimizer: RowUpdates | None


def decide(
    tables: dict[str, Tensor], resolved: dict[str, TablePlan], optimizer: Optimizer | None, plan: Plan
) -> Updates:
    """A :class:`Choice` for each of ``tables`` (plain names). Raises :class:`PlanError` if two optimizers claim one table."""
    claimed = {id(p): group for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else {}
    choices: dict[str, Choice] = {}
    planned: dict[str, EmbeddingOptimizer] = {}
    for name, table in tables.items():
        wish = resolved[name]
        low = wish.dtype not in (None, "fp32")
        if wish.trainable is False:
            choices[name] = Choice("none", detail="frozen by the plan", required=True)
        elif not isinstance(table, nn.Parameter):
            choices[name] = Choice("keep", reason="it is a buffer, which nothing trains")
        elif not table.requires_grad:
            choices[name] = Choice("keep", reason="it is frozen (requires_grad=False)")
        elif low and not (wish.embedding_optimizer is not None and wish.embedding_optimizer.in_backward):
            raise PlanError(
                f"the plan stores table '{name}' as {wish.dtype}, and it is trained: its gradients are kept in float32 inside the backward only. "
                "Give it an embedding_optimizer with in_backward: true, or trainable: false"
            )
        elif wish.embedding_optimizer is not None:
            if id(table) in claimed:
                raise PlanError(
                    f"table '{name}' has two optimizers: the plan's {wish.embedding_optimizer.key} and the "
                    f"{type(optimizer).__name__} passed as optimizer=. Build that one without the tables "
                    "(opt.dense_parameters() lists the others), or take embedding_optimizer out of the plan"
                )
            if wish.embedding_optimizer.in_backward and plan.precision == "fp16":
                raise PlanError(
                    f"the plan updates table '{name}' inside the backward and computes in fp16, whose gradients need loss scaling: the table "
                    "would take scaled gradients. Say precision: bf16, or in_backward: false"
                )
            planned[name] = wish.embedding_optimizer
        elif id(table) in claimed:
            choices[name] = _user_choice(table, optimizer, claimed[id(table)], plan.numerics)
        else:
            choices[name] = Choice("keep", reason=_nobody(optimizer))
    stored = {name for name in planned if resolved[name].dtype not in (None, "fp32")}
    plan_optimizer = _plan_optimizer(tables, planned, stored) if planned else None
    if plan_optimizer is not None:
        plan_optimizer.huge_pages = plan.huge_pages
    owner = in_backward.register(plan_optimizer) if plan_optimizer is not None else -1
    for name, chosen in planned.items():
        grad = "in_backward" if chosen.in_backward else "sparse"
        how = "updated inside the backward" if chosen.in_backward else "updated by opt.embedding_optimizer.step()"
        moves = chosen.key == "adam" or chosen.weight_decay != 0
        choices[name] = Choice(grad, detail=f"{chosen.key}, {how}", owner=owner, required=True, moves_by_zero=moves)
    return Updates({name: choices[name] for name in tables}, plan_optimizer)


def _nobody(optimizer: Optimizer | None) -> str:
    if optimizer is None:
        return "no optimizer was given: pass optimizer= to optimize(), or an embedding_optimizer in the plan"
    return f"the {type(optimizer).__name__} passed as optimizer= does not hold it"


def _user_choice(table: Tensor, optimizer: Optimizer | None, group: dict, numerics: str) -> Choice:
    assert optimizer is not None
    reason = why_not_row_wise(optimizer, group, lazy=numerics == "approximate")
    if reason is None and (table._backward_hooks or table._post_accumulate_grad_hooks):
        reason = "a gradient hook on it may not expect a sparse gradient"
    if reason is None and table.dtype == torch.float16 and table.device.type == "cpu":
        reason = "torch cannot add sparse fp16 gradients on CPU, as several forwards or backwards of one step need"
    if reason is not None:
        return Choice("keep", reason=reason)
    moves = why_not_row_wise(optimizer, group, lazy=False) is not None
    return Choice("sparse", detail=f"{type(optimizer).__name__} on touched rows, one fused step", moves_by_zero=moves)


def _plan_optimizer(tables: dict[str, Tensor], planned: dict[str, EmbeddingOptimizer], stored: set[str]) -> RowUpdates:
    """``stored``: the tables that are stored in a lower dtype, which are rounded stochastically."""
    groups: dict[tuple[EmbeddingOptimizer, bool], dict] = {}
    for name, chosen in planned.items():
        new = {"params": [], "kind": chosen.key, **chosen.settings(), "stochastic": name in stored}
        group = groups.setdefault((chosen, name in stored), new)
        group["params"].append((name, tables[name]))
    return RowUpdates(list(groups.values()))


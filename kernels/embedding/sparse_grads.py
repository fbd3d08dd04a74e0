"""What a backward of our own says to autograd: sparse gradients that stay coalesced, second derivatives that are refused."""
from __future__ import annotations

import torch
from torch import Tensor


def coalesced(rows: Tensor, values: Tensor, table: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, table.shape, is_coalesced=True, check_invariants=False)


def keep_coalesced(tables: list[Tensor], grads: list[Tensor | None]) -> None:
    """Autograd stores a first sparse gradient without its "coalesced" mark: restore it when this backward ends, where nothing
    else was added to it. Without the mark every optimizer would sort the rows again."""
    stored = [(t, g._values().data_ptr()) for t, g in zip(tables, grads) if g is not None and g.is_sparse and t.is_leaf]

    def restore() -> None:
        for table, values in stored:
            grad = table.grad
            if grad is not None and grad.is_sparse and grad._values().data_ptr() == values:
                grad._coalesced_(True)

    if stored:
        torch.autograd.Variable._execution_engine.queue_callback(restore)


def refuse_to_record(tensors: list[Tensor]) -> None:
    """``RuntimeError`` if the running backward, whose own derivatives were asked for, makes a gradient of one of ``tensors``: it would
    be one without a history. The others are not on the way to what ``torch.autograd.grad`` was asked for."""
    for tensor in tensors:
        try:
            reached = _accumulates(tensor)
        except RuntimeError:  # autograd says that it is one of those that were asked for
            reached = True
        if reached:
            raise RuntimeError(
                "second derivatives through a fused lookup are not provided, and this backward was asked for with create_graph=True: "
                "turn group_tables and pool_sequences off in the plan to differentiate twice"
            )


def _accumulates(table: Tensor) -> bool:
    """Would the running backward add to ``table.grad``? Not under ``torch.autograd.grad`` of something else."""
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(table).node)

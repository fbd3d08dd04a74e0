"""What a plan says of the training loop (``training``), applied to the model and the optimizer that ``optimize`` returns."""
from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from .accumulate import step_by_rounds
from .backward_steps import step_in_backward, without_optimizer

if TYPE_CHECKING:
    from .optimized_model import OptimizedModel


def for_the_loop(model: OptimizedModel, optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer (``None`` where none was given) that does what the model's plan says. Raises :class:`PlanError` where it cannot."""
    said = model.plan.training
    if said.in_backward == "all" and optimizer is None:
        without_optimizer(model)
    elif said.in_backward == "all":
        return step_in_backward(model, optimizer)
    return step_by_rounds(model, optimizer, said.accumulate) if said.accumulate > 1 else optimizer

"""What a plan says of the training loop: ``training`` and ``pipeline``.

```yaml
training:
  in_backward: all            # tables | all: step every parameter of optimizer= as its gradient arrives, and free the gradient
  accumulate: 1               # the optimizer's step() takes effect at every n-th call, with the sum of n gradients
  checkpoint: ["over*"]       # globs on module paths: what these modules compute is computed again in the backward, not kept
pipeline:
  prefetch: 2                 # batches that tw.pipeline loads, and whose rows it fetches, ahead
  staleness: 0                # lookups of tw.pipeline may read rows that lack the updates of up to so many batches (approximate)
```
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .errors import PlanError

IN_BACKWARD = ("tables", "all")


@dataclass(frozen=True)
class TrainingPlan:
    """See the module. ``in_backward: tables`` leaves to ``embedding_optimizer`` which tables are updated there."""

    in_backward: str = "tables"
    accumulate: int = 1
    checkpoint: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _number("training.accumulate", self.accumulate, 1, "a number of batches, 1 or more")
        if self.in_backward not in IN_BACKWARD:
            raise PlanError(f"training.in_backward is {self.in_backward!r}; it must be {' | '.join(IN_BACKWARD)}")
        globs = (self.checkpoint,) if isinstance(self.checkpoint, str) else self.checkpoint
        if not isinstance(globs, (list, tuple)) or not all(isinstance(g, str) and g for g in globs):
            raise PlanError(f"training.checkpoint is {self.checkpoint!r}; it must be a list of globs on module paths")
        object.__setattr__(self, "checkpoint", tuple(globs))
        if self.accumulate > 1 and self.in_backward == "all":
            raise PlanError(
                f"training is in_backward: all and accumulate: {self.accumulate}; gradients that are accumulated have to be kept. Take one of them out"
            )


@dataclass(frozen=True)
class PipelinePlan:
    """See the module."""

    prefetch: int = 2
    staleness: int = 0

    def __post_init__(self) -> None:
        _number("pipeline.prefetch", self.prefetch, 1, "a number of batches, 1 or more")
        _number("pipeline.staleness", self.staleness, 0, "a number of batches, 0 or more")


def said(value: TrainingPlan | PipelinePlan) -> dict[str, Any]:
    """Plain values that a plan reads back; what is as it would be anyway is left out."""
    held = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default and f.default is not MISSING}
    return {key: list(each) if isinstance(each, tuple) else each for key, each in held.items()}


def refuse_together(training: TrainingPlan, pipeline: PipelinePlan, numerics: str, tables: Mapping[str, Any], optimizer: Any) -> None:
    """Raises :class:`PlanError` where what the plan says of the loop does not go with the rest of it. ``tables``: glob to what it says;
    ``optimizer``: the plan's own, of all tables."""
    if pipeline.staleness and numerics != "approximate":
        raise PlanError(
            f"pipeline.staleness is {pipeline.staleness}, which is approximate, and the plan allows {numerics} at most: say numerics: approximate, or staleness: 0"
        )
    chosen = {"": optimizer, **{glob: t.embedding_optimizer for glob, t in tables.items()}}
    for glob, each in chosen.items():
        where = f"tables.{glob}.embedding_optimizer" if glob else "embedding_optimizer"
        if each is not None and each.in_backward and training.accumulate > 1:
            raise PlanError(
                f"{where} is in_backward: true and training.accumulate is {training.accumulate}: an update inside each backward cannot wait for "
                "the gradients of other batches. Say in_backward: false, or accumulate: 1"
            )
        if each is not None and not each.in_backward and training.in_backward == "all":
            raise PlanError(f"training is in_backward: all, and {where} is in_backward: false: say in_backward: true there")
    dynamic = next((glob for glob, t in tables.items() if t.ids is not None), None)
    if dynamic is not None and (training.accumulate > 1 or pipeline.staleness):
        other = f"training.accumulate is {training.accumulate}" if training.accumulate > 1 else f"pipeline.staleness is {pipeline.staleness}"
        raise PlanError(
            f"tables.{dynamic} has dynamic ids and {other}: rows are given to ids in the order of the steps, and held until the next one. Take one of them out"
        )
    stored = next((glob for glob, t in tables.items() if t.storage is not None), None)
    if stored is not None and training.accumulate > 1:
        raise PlanError(
            f"tables.{stored} is in tiers and training.accumulate is {training.accumulate}: rows that were looked up would have to stay in the "
            "cache until the step that takes effect. Take one of them out"
        )


def _number(where: str, value: Any, least: int, needed: str) -> None:
    if type(value) is not int or value < least:
        raise PlanError(f"{where} is {value!r}; it must be {needed}")

"""The sample inputs that a user passes, in one form."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import PlanError


@dataclass(frozen=True)
class Samples:
    """``args`` and ``kwargs`` of one batch (``None``: no samples), and ``more`` batches as (args, kwargs)."""

    args: tuple | None = None
    kwargs: dict | None = None
    more: tuple[tuple[tuple, dict], ...] = ()

    @staticmethod
    def read(sample_inputs: Any, sample_kwargs: Mapping[str, Any] | None) -> Samples:
        """Raises :class:`PlanError` where it is not clear what is meant."""
        kwargs = dict(sample_kwargs or {})
        if sample_inputs is None:
            return Samples((), kwargs) if sample_kwargs else Samples()
        if isinstance(sample_inputs, list):
            if not sample_inputs or not all(isinstance(b, (tuple, Tensor, Mapping)) for b in sample_inputs):
                raise PlanError(
                    "sample_inputs is a list, which means several batches, each a tuple of positional arguments; "
                    "for one batch pass a tuple, e.g. (dense, ids), also where an argument is a list: (dense, [ids1, ids2])"
                )
            batches = [(_args(b), kwargs) for b in sample_inputs]
            return Samples(*batches[0], more=tuple(batches[1:]))
        return Samples(_args(sample_inputs), kwargs)


def _args(batch: Any) -> tuple:
    return batch if isinstance(batch, tuple) else (batch,)

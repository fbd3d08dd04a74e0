"""Calls of a model whose graphs are each for one way that data takes: which serves a batch shows when it runs."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .capture.data_guard import OtherData
from .errors import CaptureError
from .methods import plainly as no_lost_gradients

if TYPE_CHECKING:
    from .optimized_model import OptimizedModel
    from .variant import Variant


def call(model: OptimizedModel, entry: str, args: tuple, kwargs: dict, others: Sequence[Variant] = ()) -> Any:
    """Run the first variant but ``others`` that serves this call; one is made where none does."""
    if torch.compiler.is_compiling():
        return model._run(model._variant_for_mode(entry), args, kwargs)
    others = list(others)
    while True:
        known = list(model._variants)
        variant = model._variant_for(args, kwargs, entry, others)
        with model._runs:
            try:
                return model._run(variant, args, kwargs)
            except OtherData as error:
                if error.__cause__ is not None or not any(variant is each for each in known):
                    return plainly(model, entry, args, kwargs, error)  # the model's own error, or a way that chance decides
                others.append(variant)


def plainly(model: OptimizedModel, entry: str, args: tuple, kwargs: dict, error: OtherData) -> Any:
    """The plain model on the shared weights; its own error, if it has one. Raises CaptureError where the tables are not whole."""
    if model._sharded is not None or model._tiered is not None:
        raise CaptureError(f"{entry}() cannot run plainly on tables that are not whole in memory; {error}") from error
    method = getattr(model._shell, entry)
    if model._guard is not None:
        method = no_lost_gradients(method, model._in_backward_tables())
    return method(*args, **kwargs)


def say(model: OptimizedModel, sentence: str) -> None:
    """Add to the report's notes, and warn: what it says was found out by a call."""
    model.__dict__["_report"] = replace(model._report, notes=(*model._report.notes, sentence))
    warnings.warn(f"{type(model._shell).__name__}: {sentence}", stacklevel=6)

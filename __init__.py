"""Tablewright: a compiler for embedding models. ``optimize(model, plan)`` makes a plain PyTorch recommender train faster.

Names are imported on first use (PEP 562), so that ``import tablewright`` costs nothing.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "optimize": "rewriter.optimize",
    "OptimizedModel": "rewriter.optimized_model",
    "Plan": "rewriter.plan",
    "TablePlan": "rewriter.plan",
    "Storage": "rewriter.storage",
    "Hashing": "rewriter.compression",
    "QuotientRemainder": "rewriter.compression",
    "MixedDim": "rewriter.compression",
    "ProductQuantization": "rewriter.compression",
    "DynamicIds": "rewriter.dynamic_ids",
    "pipeline": "rewriter.prefetch",
    "Communication": "rewriter.placement",
    "Topology": "rewriter.planner.topology",
    "Measured": "rewriter.planner.forecast",
    "SGD": "rewriter.optimizer_plan",
    "Adagrad": "rewriter.optimizer_plan",
    "RowwiseAdagrad": "rewriter.optimizer_plan",
    "Adam": "rewriter.optimizer_plan",
    "Report": "rewriter.report",
    "training_state": "rewriter.sharded_state",
    "load_training_state": "rewriter.sharded_state",
    "ShardedTable": "rewriter.sharded_state",
    "even_batches": "rewriter.even_batches",
    "clip_grad_norm_": "rewriter.clipping",
    "PeerError": "kernels.collectives.errors",
    "Equivalence": "rewriter.equivalence",
    "export_serving": "rewriter.serving.export",
    "export_delta": "rewriter.serving.export",
    "check_parity": "rewriter.serving.parity",
    "load_serving": "rewriter.serving.predictor",
    "Predictor": "rewriter.serving.predictor",
    "TablewrightError": "rewriter.errors",
    "CaptureError": "rewriter.errors",
    "PlanError": "rewriter.errors",
    "PassError": "rewriter.errors",
    "VerifyError": "rewriter.errors",
    "ExportError": "rewriter.errors",
    "InBackwardError": "rewriter.errors",
    "ServingError": "kernels.errors",
    "InputError": "kernels.errors",
    "InputTypeError": "kernels.errors",
    "IdOutOfRange": "kernels.errors",
    "UnknownTable": "kernels.errors",
    "CorruptShard": "kernels.errors",
    "VersionSkew": "kernels.errors",
    "StoreIncomplete": "kernels.errors",
    "StoreUnavailable": "kernels.errors",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from .kernels.collectives.errors import PeerError
    from .kernels.errors import (
        CorruptShard,
        IdOutOfRange,
        InputError,
        InputTypeError,
        ServingError,
        StoreIncomplete,
        StoreUnavailable,
        UnknownTable,
        VersionSkew,
    )
    from .rewriter.clipping import clip_grad_norm_
    from .rewriter.compression import Hashing, MixedDim, ProductQuantization, QuotientRemainder
    from .rewriter.dynamic_ids import DynamicIds
    from .rewriter.equivalence import Equivalence
    from .rewriter.errors import (
        CaptureError,
        ExportError,
        InBackwardError,
        PassError,
        PlanError,
        TablewrightError,
        VerifyError,
    )
    from .rewriter.even_batches import even_batches
    from .rewriter.optimize import optimize
    from .rewriter.optimized_model import OptimizedModel
    from .rewriter.optimizer_plan import SGD, Adagrad, Adam, RowwiseAdagrad
    from .rewriter.placement import Communication
    from .rewriter.plan import Plan, TablePlan
    from .rewriter.planner.forecast import Measured
    from .rewriter.planner.topology import Topology
    from .rewriter.prefetch import pipeline
    from .rewriter.report import Report
    from .rewriter.serving.export import export_delta, export_serving
    from .rewriter.serving.parity import check_parity
    from .rewriter.serving.predictor import Predictor, load_serving
    from .rewriter.sharded_state import ShardedTable, load_training_state, training_state
    from .rewriter.storage import Storage


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

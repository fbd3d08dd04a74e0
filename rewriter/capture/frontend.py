"""The order of the doors: FX tracing first, export where it fails and example inputs exist, each checked against the model."""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ..errors import CaptureError, explain
from . import fx_tracer
from .guards import Guards
from .shell import refuse_hooks


@dataclass
class Captured:
    """A captured model.

    ``graph``: flat placeholders (one per tensor or number leaf of ``(args, kwargs)``, in pytree order), ATen training IR,
    ``get_attr`` nodes under the plain model's names, and an output node that is a flat tuple of the result's leaves.
    ``in_spec``/``out_spec``: TreeSpecs of ``(args, kwargs)`` and of the result. ``door``: "fx" or "export".
    ``notes``: sentences for the report.
    """

    graph: fx.Graph
    in_spec: object
    out_spec: object
    door: str
    guards: Guards
    notes: list[str] = field(default_factory=list)


def capture(shell: nn.Module, args: tuple | None, kwargs: dict | None = None, *,
            originals: dict[str, nn.Module] | None = None) -> Captured:
    """Captures ``shell(*args, **kwargs)`` in the shell's current mode.

    ``args`` may be a list of two ``(args, kwargs)`` batches, or None to trace without inputs. ``originals`` maps module
    paths to the user's own modules, whose attributes are then guarded too. Nothing that belongs to the user changes.
    Raises CaptureError naming the user's line, the cause and the way out.
    """
    refuse_hooks(shell)
    batches = None
    if args is not None:
        batches = [(tuple(a), dict(k or {})) for a, k in args] if isinstance(args, list) else [(tuple(args), dict(kwargs or {}))]
    first = batches[0] if batches else (None, None)
    graph, inputs, out_spec, log = fx_tracer.trace(shell, *first)
    return Captured(graph, inputs.spec, out_spec, "fx", Guards(shell, originals, inputs, log))

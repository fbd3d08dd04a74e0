"""Measured time of every node, by running the graphs node by node."""
from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter

from ..capture import attach


class _Timer(Interpreter):
    def __init__(self, module: Any, seconds: dict[str, list[float]]) -> None:
        super().__init__(module)
        self.seconds = seconds

    def run_node(self, n):
        if n.op != "call_function":
            return super().run_node(n)
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        synchronize()
        started = time.perf_counter()
        value = super().run_node(n)
        synchronize()
        self.seconds.setdefault(n.name, []).append(time.perf_counter() - started)
        return value


def time_nodes(model: Any, *args: Any, rounds: int = 7) -> dict[str, float]:
    """Seconds of each node's forward by name, the median of ``rounds`` runs (after one that is not counted), for the captured graph
    and the rewritten one. Runs in the model's mode without gradients, on copies of the buffers; the random state is kept. Nodes of a
    model that runs in pieces are not timed. Raises ``ValueError`` where no variant fits ``args``."""
    variant = model._variant_for(args, {})
    if variant.captured.program is not None:
        return {}
    found: dict[str, float] = {}
    inputs = variant.captured.guards.flatten(args, {})
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng(), torch.no_grad():
        for graph in (variant.steps[0].before if variant.steps else variant.graph, variant.graph):
            seconds: dict[str, list[float]] = {}
            timer = _Timer(attach(model._shell, graph), seconds)
            for _ in range(rounds + 1):
                timer.run(*[i.detach() if isinstance(i, Tensor) else i for i in inputs])
            found.update({name: statistics.median(times[1:]) for name, times in seconds.items()})
        for buffer, value in buffers:
            buffer.copy_(value)
    return found

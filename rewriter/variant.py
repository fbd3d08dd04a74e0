"""One captured and rewritten form of a model: what ``OptimizedModel`` runs."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from ..passes.recompute_modules import folded
from .capture import Captured
from .capture.data_guard import guarded
from .capture.entry import packer, with_live_tensors
from .eager_form import called_directly, without_idle_calls
from .pipeline import Step
from .verify import copy_graph


@dataclass
class Variant:
    """One captured and rewritten form of the model, valid while its guards hold."""

    captured: Captured
    graph: Graph
    steps: list[Step]
    module: torch.fx.GraphModule
    unverified: bool = False  # captured without inputs: compared with the plain model at the first call
    graphs: list[Graph] = field(default_factory=list)  # the rewritten graphs of a program's pieces; else the one graph
    run: Callable[..., tuple] = field(init=False, repr=False)  # what eager calls: the same graph, ops called directly
    enter: Callable[[tuple, dict], list | None] = field(init=False, repr=False)  # its inputs, where all guards hold
    pack: Callable[[tuple], Any] = field(init=False, repr=False)  # from its outputs to the model's

    def __post_init__(self) -> None:
        if self.captured.program is None:
            self.graphs = [self.graph]
        inputs_guarded = self.captured.program is None and not self.captured.guards.inputs.abstract
        self.run = guarded(runnable(self.module._shell, self.graph, inputs_guarded), self.module._shell, self.graph)
        self.enter = first_call
        self.pack = packer(self.captured, self.module._shell)

    @property
    def pieces(self) -> int:
        """In how many graphs the model runs; 0 where it runs plainly."""
        program = self.captured.program
        return 1 if program is None else len(program.pieces)


def first_call(args: tuple, kwargs: dict) -> None:
    """What ``Variant.enter`` is until the guards have held once."""


def runnable(shell: nn.Module, graph: Graph, inputs_guarded: bool = False) -> Callable[..., tuple]:
    """What eager mode calls for ``graph``: a copy of it whose ops are called directly, on the shell. ``inputs_guarded``: only with
    inputs of the captured dtypes and device."""
    lean = copy_graph(graph)
    without_idle_calls(lean, shell, inputs_guarded)
    direct = folded(lean, called_directly)
    called_directly(direct)
    return with_live_tensors(shell, direct)

"""The one ``torch.library`` namespace that every Tablewright op lives in."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("tablewright", "FRAGMENT")
# op -> a Python function that does the same without the trip through torch's dispatcher: what eager mode calls
DIRECT: dict[Any, Callable] = {}


def tracing() -> bool:
    """True while torch traces or fakes (AOT autograd, export, fake tensors): an op must then go through the dispatcher so
    that the trace sees it. Otherwise a call may go straight to its implementation, which saves 25 us for 26 tables."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None

"""Where a graph node comes from: the plain model's module, the user's line, and the pass that made it.

Every node that capture or a pass creates carries one, under ``node.meta["origin"]``; a node without is an error.
"""
from __future__ import annotations

from dataclasses import dataclass

KEY = "origin"


@dataclass(frozen=True)
class Origin:
    """``sources``: names of captured nodes this one stands for. ``made_by``: "capture" or the pass. ``module_path``: the
    innermost plain module ("" is the model itself). ``location``: the user's ``file.py:41``, "" where unknown."""

    sources: tuple[str, ...]
    made_by: str
    module_path: str = ""
    location: str = ""

    def where(self) -> str:
        """For people: ``over_arch.2 (model.py:41)``."""
        path = self.module_path or "the model"
        return f"{path} ({self.location})" if self.location else path

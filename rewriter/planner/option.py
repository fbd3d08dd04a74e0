"""One way to place one table, as numbers: what the search knows of it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Option:
    """One way to place one table. ``costs`` and ``memory`` (seconds, bytes, ``[shards]``): one entry for each shard. Shards come in groups of ``width``
    that lie on ``width`` consecutive ranks: 1 for any rank, the size of a node for the ranks of a node, all ranks for a fixed place. The
    groups of an option lie in different places. ``everywhere``: seconds on each rank besides; ``everywhere_memory``: bytes.
    ``label`` is the caller's."""

    costs: Sequence[float] | np.ndarray
    memory: Sequence[float] | np.ndarray
    width: int = 1
    everywhere: float = 0.0
    everywhere_memory: float = 0.0
    label: Any = None

    def mean(self, ranks: int) -> float:
        """Seconds a rank, if they were spread evenly."""
        return self.everywhere + float(np.sum(self.costs)) / ranks

    def mean_memory(self, ranks: int) -> float:
        """Bytes a rank, if they were spread evenly."""
        return self.everywhere_memory + float(np.sum(self.memory)) / ranks

    @property
    def largest(self) -> float:
        """The least that the slowest rank takes with this option."""
        return self.everywhere + most(self.costs)

    @property
    def largest_memory(self) -> float:
        """The least that the fullest rank holds with this option."""
        return self.everywhere_memory + most(self.memory)


def most(values: Sequence[float] | np.ndarray) -> float:
    """The largest, 0 of none."""
    return float(np.max(values)) if len(values) else 0.0


def size(count: float) -> str:
    """Bytes for people."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.4g} {unit}"
    return f"{count:.0f} B"

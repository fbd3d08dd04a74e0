"""Ids without a vocabulary, in the words of a plan: ``ids``.

```yaml
tables:
  "query": {ids: {dynamic: true, capacity: 50_000_000, admit_after: 2, evict: lru}}    # the rest: {default: 0, init: {normal: [0, 1]}, seed: 0}
```

Any 64-bit number is an id, negative ones too; the plain model's number of rows means nothing. An id has a row once it has been seen
``admit_after`` times in training; of more than ``capacity`` ids some leave: those used longest ago (``lru``), used by the fewest batches
(``lfu``) or admitted longest ago (``age``). What has no row reads ``default`` in every column, trains nothing, and is counted. A row starts
from ``(seed, id)`` by ``init`` (as ``storage.init``), also where the id had one before. The ``padding_idx`` of the plain model is an id that is left out. A table
that is not trained admits nothing. Until the step, ``.grad`` has a row for the default too: norms of gradients count it.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..kernels.dynamic_ids.id_map import LARGEST, POLICIES
from .errors import PlanError, nearest
from .plan_words import part_from
from .storage import init_from

_LARGEST_FLOAT = 3.4028234663852886e38  # of 32 bits


@dataclass(frozen=True)
class DynamicIds:
    """A table with dynamic ids; see the module. ``capacity``: rows. Raises :class:`PlanError` for values that mean nothing."""

    capacity: int
    dynamic: bool = True
    admit_after: int = 1
    evict: str = "lru"
    default: float = 0.0
    init: tuple[str, tuple[float, ...]] = ("normal", (0.0, 1.0))
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "init", init_from(self.init, "ids.init"))
        if self.dynamic is not True:
            raise PlanError(f"ids.dynamic is {self.dynamic!r}; it must be true (leave ids out for a table whose ids are its rows)")
        if type(self.capacity) is not int or not 1 <= self.capacity <= LARGEST:
            raise PlanError(f"ids.capacity is {self.capacity!r}; it must be a number of rows from 1 to {LARGEST}")
        if type(self.admit_after) is not int or not 1 <= self.admit_after < 2**63:
            raise PlanError(f"ids.admit_after is {self.admit_after!r}; it must be a number of times, 1 or more")
        if self.evict not in POLICIES:
            raise PlanError(f"ids.evict is {self.evict!r}{nearest(str(self.evict), POLICIES)}; it must be {' | '.join(POLICIES)}")
        if isinstance(self.default, bool) or not isinstance(self.default, (int, float)) or not abs(self.default) <= _LARGEST_FLOAT:
            raise PlanError(f"ids.default is {self.default!r}; it must be the number that every column of an id without a row has")
        object.__setattr__(self, "default", float(self.default))
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise PlanError(f"ids.seed is {self.seed!r}; it must be an integer, 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that :func:`ids_from` reads back; what is as it would be anyway is left out."""
        made: dict[str, Any] = {"dynamic": True}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                made[f.name] = {value[0]: list(value[1])} if f.name == "init" else value
        return made


def ids_from(raw: Any, where: str) -> DynamicIds:
    """From plain values. Raises :class:`PlanError` naming the key and its nearest match."""
    return part_from(DynamicIds, raw, where, "{dynamic: true, capacity: 50_000_000}", needed=("dynamic", "capacity"))

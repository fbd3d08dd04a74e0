"""Where a table that is larger than memory lives, in the words of a plan: ``storage``.

```yaml
tables:
  "user*": {storage: {cache: 4GB, backing: ssd, path: user.rows}}    # the rest: {cache_on: host, policy: lru, init: {normal: [0, 1]}, seed: 0}
  "item*": {storage: {cache: 12GB, cache_on: cuda, backing: host}}   # no path: all rows are in the host's memory
```

``cache``: bytes of memory for rows and their optimizer state (``4GB`` is 4e9, ``4GiB`` 2**32); over a file, half as much again (16 MiB at least) keeps
what left it last. ``cache_on``: ``host``; ``cuda``, where the model is on
a GPU; or ``cpu``, which is the code of ``cuda`` with its cache in the host's memory, to try such a plan without a GPU. ``backing``: ``ssd``, a
file; or ``host``, memory, for a cache on a device. Caches on ``cuda`` have not been run on a GPU yet; those on ``cpu`` are tested. ``path``: a folder for the rows of a file. ``init``: how
rows start that the model itself does not hold (its table is on the meta device): ``{normal: [mean, deviation]}``, ``{uniform: [low, high]}``
or ``{constant: value}``. ``resume``: the folder of the snapshot (``opt.snapshot(folder)``) to go on from.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import PlanError
from .plan_words import part_from

POLICIES = ("lru", "lfu")
PLACES, BACKINGS = ("host", "cuda", "cpu"), ("ssd", "host")
_EXAMPLE = "{cache: 4GB, path: user.rows}"
_NUMBERS = {"normal": 2, "uniform": 2, "constant": 1}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Storage:
    """A table in tiers; see the module. Raises :class:`PlanError` for values that mean nothing."""

    cache: int | str
    path: str = ""
    backing: str = "ssd"
    cache_on: str = "host"
    policy: str = "lru"
    init: tuple[str, tuple[float, ...]] = ("normal", (0.0, 1.0))
    seed: int = 0
    resume: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", _bytes(self.cache))
        object.__setattr__(self, "init", init_from(self.init, "storage.init"))
        if self.cache_on not in PLACES or self.backing not in BACKINGS:
            raise PlanError(
                f"storage is cache_on: {self.cache_on}, backing: {self.backing}; they must be one of {' | '.join(PLACES)} and one of {' | '.join(BACKINGS)}"
            )
        if not isinstance(self.resume, str):
            raise PlanError(f"storage.resume is {self.resume!r}; it must be the folder that opt.snapshot() was given")
        if self.backing == "host":
            self._check_host()
        elif not isinstance(self.path, str) or not self.path:
            raise PlanError(f"storage says no path (it is {self.path!r}); backing: ssd needs the path of a folder for the table's rows, as in {_EXAMPLE}")
        if self.policy not in POLICIES:
            raise PlanError(f"storage.policy is {self.policy!r}; it must be {' | '.join(POLICIES)}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise PlanError(f"storage.seed is {self.seed!r}; it must be an integer, 0 or more")

    def _check_host(self) -> None:
        if self.cache_on == "host":
            raise PlanError("storage is cache_on: host, backing: host: a cache of memory in memory gains nothing; say cache_on: cuda, or backing: ssd with a path")
        if self.path:
            raise PlanError(f"storage is backing: host with path: {self.path!r}; rows in the host's memory have no file: leave path out, or say backing: ssd")
        if self.resume:
            raise PlanError("storage is backing: host with resume; opt.restore(folder) reads such rows from a snapshot: leave resume out")

    @property
    def on_device(self) -> bool:
        """Whether the cache is a device's."""
        return self.cache_on != "host"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that :func:`storage_from` reads back; what is as it would be anyway is left out."""
        made: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                made[f.name] = {value[0]: list(value[1])} if f.name == "init" else value
        return made


def storage_from(raw: Any, where: str) -> Storage:
    """From plain values. Raises :class:`PlanError` naming the key and its nearest match."""
    return part_from(Storage, raw, where, _EXAMPLE)


def _bytes(value: Any) -> int:
    if type(value) is int and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise PlanError(f"storage.cache is {value!r}; it must be a number of bytes such as 4GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def init_from(value: Any, where: str) -> tuple[str, tuple[float, ...]]:
    """How rows start, from plain values. Raises :class:`PlanError`."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], tuple):
        value = {value[0]: list(value[1])}
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, numbers),) = value.items()
        numbers = numbers if isinstance(numbers, (list, tuple)) else [numbers]
        if kind in _NUMBERS and len(numbers) == _NUMBERS[kind] and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
            return kind, tuple(float(n) for n in numbers)
    raise PlanError(f"{where} is {value!r}; it must be {{normal: [mean, deviation]}}, {{uniform: [low, high]}} or {{constant: value}}")

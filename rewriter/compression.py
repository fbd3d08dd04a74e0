"""How a table is made smaller, in the words of a plan: ``compress``, with one of

```yaml
tables:
  "user*":  {compress: {hashing: {rows: 1000}}}                                    # ids modulo 1000
  "item*":  {compress: {quotient_remainder: {buckets: 1000, combine: multiply}}}   # or combine: add
  "query*": {compress: {mixed_dim: {dim: 8}}}                                      # narrower rows, and a projection
  "page*":  {compress: {product_quantization: {parts: 8}}}                         # of a trained table: a byte for each part of a row
```

Formulas and sources: ``kernels/compression.py``. Every one of them needs ``numerics: approximate``, which
also lets an Adam of the user's step looked-up rows only.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from .errors import PlanError, nearest
from .plan_words import part_from

COMBINE = ("multiply", "add")


@dataclass(frozen=True)
class Compression:
    """Base of the ways to make a table smaller."""

    key: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, where = getattr(self, f.name), f"{self.key}.{f.name}"
            if f.name == "combine":
                if value not in COMBINE:
                    raise PlanError(f"{where} is {value!r}{nearest(str(value), COMBINE)}; it must be {' | '.join(COMBINE)}")
            elif type(value) is not int or value < 1:
                raise PlanError(f"{where} is {value!r}; it must be a whole number above 0")


@dataclass(frozen=True)
class Hashing(Compression):
    """The hashing trick: id ``i`` reads row ``i mod rows``."""

    rows: int
    key: ClassVar[str] = "hashing"


@dataclass(frozen=True)
class QuotientRemainder(Compression):
    """The quotient-remainder trick: id ``i`` reads row ``i // buckets`` of one table and row ``i mod buckets`` of another, which are
    multiplied element by element, or added."""

    buckets: int
    combine: str = "multiply"
    key: ClassVar[str] = "quotient_remainder"


@dataclass(frozen=True)
class MixedDim(Compression):
    """Rows of ``dim`` numbers, and a matrix that projects them to the model's dimension."""

    dim: int
    key: ClassVar[str] = "mixed_dim"


@dataclass(frozen=True)
class ProductQuantization(Compression):
    """Rows in ``parts`` parts, each one of 256 centroids: one byte a part. For trained tables, which then are not trained any more."""

    parts: int
    key: ClassVar[str] = "product_quantization"


@dataclass(frozen=True)
class Int8Rows(Compression):
    """A byte a value, a scale and an offset a row (``kernels/codecs``); in a plan ``dtype: int8``. For tables that are not trained."""

    key: ClassVar[str] = "int8"


_KINDS: dict[str, type[Compression]] = {c.key: c for c in (Hashing, QuotientRemainder, MixedDim, ProductQuantization)}


def compression_from(raw: Any, where: str) -> Compression:
    """From plain values, ``{hashing: {rows: 1000}}``. Raises :class:`PlanError` naming the key and its nearest match."""
    if isinstance(raw, Compression):
        return raw
    if not isinstance(raw, Mapping) or len(raw) != 1 or not isinstance(next(iter(raw.values())), Mapping):
        raise PlanError(f"{where} is {raw!r}; it must be one of {', '.join(_KINDS)}, as {{hashing: {{rows: 1000}}}}")
    ((key, options),) = raw.items()
    if key not in _KINDS:
        raise PlanError(f"{where} has no key '{key}'{nearest(str(key), _KINDS)}. Known: {', '.join(_KINDS)}")
    return part_from(_KINDS[key], options, f"{where}.{key}", f"{{{fields(_KINDS[key])[0].name}: 1000}}")


def compression_to(value: Compression) -> dict[str, Any]:
    """Plain values that :func:`compression_from` reads back."""
    return {value.key: asdict(value)}

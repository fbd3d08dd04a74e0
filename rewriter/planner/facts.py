"""What the planner knows of each table: its size, how often it is read, and how its ids are spread.

How many different ids several batches hold is not in a sample of one. It is counted for draws by Zipf's law with the exponent at which
one batch would hold as many different ids as the sample does; an exponent of 0 is uniform.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TableFacts:
    """``rows`` x ``dim`` of ``itemsize`` bytes. On one rank and step ``ids`` ids are looked up, of which ``unique`` are different, and ``bags``
    results are made. ``state``: bytes of optimizer state for each value, ``row_state``: for each row; ``trained``: does
    it have gradients. ``alpha``: the exponent of Zipf's law. ``sample``: the different ids seen and how often each, sorted; ``None`` counts them as spread evenly over the rows.
    ``pooled``: ids are summed into bags; else each id has its own result. ``assumed`` says what was not known."""

    name: str
    rows: int
    dim: int
    ids: float
    bags: float
    unique: float
    alpha: float = 0.0
    itemsize: int = 4
    state: float = 0.0
    row_state: float = 0.0
    trained: bool = True
    pooled: bool = True
    sample: tuple[np.ndarray, np.ndarray] | None = None
    assumed: str = ""

    @property
    def bytes(self) -> float:
        """Weights and optimizer state of the whole table."""
        return self.held(self.rows, self.dim)

    def held(self, rows: Any, columns: Any) -> Any:
        """Weights and optimizer state of a part of it."""
        return rows * (columns * (self.itemsize + self.state) + self.row_state)

    def unique_in(self, batches: float) -> float:
        """Different ids of so many ranks' batches together."""
        return self.unique if batches == 1 else expected_unique(self.rows, self.ids * batches, self.alpha)

    def ranges(self, parts: int, split: str = "even") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of each of ``parts`` ranges, and the parts of the ids and of the different ids that fall into each. ``split``: "even", or
        "sample" for ranges that are read about equally often."""
        if self.sample is None or not len(self.sample[0]):
            counts = even(self.rows, parts)
            return counts, counts / self.rows, counts / self.rows
        values, seen = self.sample
        if split == "sample":  # every row counts a little, as in sample_reads.even_cuts
            least = 1e-3 * seen.sum() / self.rows
            read = np.concatenate([[0.0], np.cumsum(seen)]) + least * np.append(values, self.rows)
            firsts = np.append(values, self.rows)[np.minimum(np.searchsorted(read, read[-1] * np.arange(1, parts) / parts), len(values))]
            counts = np.diff(np.concatenate([[0], np.maximum.accumulate(firsts), [self.rows]])).astype(float)
        else:
            counts = even(self.rows, parts)
        where = np.minimum(np.searchsorted(np.cumsum(counts), values, side="right"), parts - 1)
        ids, different = np.bincount(where, weights=seen, minlength=parts), np.bincount(where, minlength=parts)
        return counts, ids / ids.sum(), different / different.sum()


def even(size: int, parts: int) -> np.ndarray:
    """How many rows (or columns) each part gets: the first ones take what is left over."""
    base, more = divmod(size, parts)
    return np.array([base + (i < more) for i in range(parts)], dtype=float)


def with_ids(
    name: str, rows: int, dim: int, ids: Sequence[Any], bags: float, *, padding: int | None = None, **more: Any
) -> TableFacts:
    """From the ids that one rank's sample batch looks up (arrays of integers). ``padding``: an id that is not read."""
    flat = np.concatenate([np.asarray(each).reshape(-1) for each in ids]) if len(ids) else np.zeros(0, dtype=np.int64)
    flat = np.where(flat < 0, flat + rows, flat)
    if padding is not None:
        flat = flat[flat != padding]
    values, counts = np.unique(flat, return_counts=True)
    alpha = fitted_alpha(rows, float(len(flat)), float(len(values)))
    return TableFacts(name, rows, dim, float(len(flat)), bags, float(len(values)), alpha, sample=(values, counts), **more)


def fitted_alpha(rows: int, ids: float, unique: float) -> float:
    """The exponent, from 0 to 4, at which ``ids`` draws from ``rows`` hold ``unique`` different values."""
    low, high = 0.0, 4.0
    if unique >= expected_unique(rows, ids, low):
        return low
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_unique(rows, ids, middle) > unique else (low, middle)
    return (low + high) / 2


def with_law(name: str, rows: int, dim: int, ids: float, bags: float, *, alpha: float = 0.0, **more: Any) -> TableFacts:
    """Of ids that follow Zipf's law with exponent ``alpha`` (0: uniform), their ranks spread over the rows as hashing spreads them."""
    return TableFacts(name, rows, dim, ids, bags, expected_unique(rows, ids, alpha), alpha, **more)


def expected_unique(rows: int, draws: float, alpha: float) -> float:
    """Different values in ``draws`` independent draws from ``rows`` of probability proportional to ``rank ** -alpha``: the sum of
    ``1 - (1 - p) ** draws``, over blocks of ranks that grow by 1 %, each counted at its middle."""
    if rows <= 0 or draws <= 0:
        return 0.0
    edges = np.unique(np.minimum(np.concatenate([np.arange(200), np.ceil(200 * 1.01 ** np.arange(2400))]), rows))
    low, width = edges[:-1], np.diff(edges)
    if edges[-1] < rows:
        low, width = np.append(low, edges[-1]), np.append(width, rows - edges[-1])
    weight = (low + (width + 1) / 2) ** -float(alpha)
    p = weight / (weight * width).sum()
    return float((width * -np.expm1(draws * np.log1p(-np.minimum(p, 1 - 1e-15)))).sum())

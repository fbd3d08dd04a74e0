"""From a request's ids to the rows that a dense graph reads: checks, one call of the store for all lookups, decoding, pooling.

numpy only. The meaning of each lookup is that of ``op.py``; what is done with an id that is no row is in ``Table.missing``.
"""
from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import IdOutOfRange, InputError, UnknownTable
from .tables import Table, decode


class Store(Protocol):
    """Where rows come from. ``wants_unique``: each row is to be asked for once, ids ascending (see ``unique.py``)."""

    wants_unique: bool

    def lookup_many(self, requests: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        """For each (table, int64 ids ``[n]``) the stored rows ``[n, table.width]``."""
        ...

    def close(self) -> None:
        """Let go of connections and files."""
        ...


class Lookups:
    """All lookups of a model. ``described``: as the manifest has them; ``defaults``: float32 ``[dim]`` for tables whose missing ids
    stand for zeros or the mean row. ``missing`` counts those ids by table. Thread-safe."""

    def __init__(self, described: Sequence[Mapping[str, Any]], tables: Mapping[str, Table], defaults: Mapping[str, np.ndarray]) -> None:
        for each in described:
            if each["table"] not in tables:
                raise UnknownTable(f"a lookup reads table '{each['table']}', which the manifest does not have: {', '.join(tables)}")
        self._all = [(each, tables[each["table"]]) for each in described]
        self._defaults = dict(defaults)
        self._columns = _column_checks(self._all)
        self._lock = threading.Lock()
        self.missing: Counter[str] = Counter()

    def __call__(self, env: Mapping[str, np.ndarray], store: Store) -> list[np.ndarray]:
        """Rows for each lookup; ``env``: inputs and computed ids by name.

        Raises :class:`IdOutOfRange`, :class:`InputError` (offsets that make no bags), and what the store raises."""
        known_good = set()
        for name, columns, limits in self._columns:
            matrix = env[name]
            if matrix.dtype == np.int64 and (matrix[:, columns].view(np.uint64) < limits).all():
                known_good.add(name)
        requests, shapes, absent = [], [], []
        for each, table in self._all:
            source = each["ids"]
            ids = _read(env, source)
            shapes.append(ids.shape)
            flat, wrong = ids if ids.ndim == 1 else ids.reshape(-1), None
            if "pre" in source or len(source) == 1 or source["input"] not in known_good:
                flat, wrong = self._checked(flat, each, table)
            requests.append((table.name, flat))
            absent.append(wrong)
        stored = store.lookup_many(requests) if any(len(ids) for _, ids in requests) else [
            np.empty((0, table.width), table.stored) for _, table in self._all]  # fmt: skip
        found = []
        for (each, table), (_, ids), shape, wrong, rows in zip(self._all, requests, shapes, absent, stored):
            rows = decode(rows, table)
            if wrong is not None:
                rows = rows.copy() if rows.base is not None else rows
                rows[wrong] = self._defaults[table.name]
            if each["kind"] == "gather":
                found.append(rows if len(shape) == 1 else rows.reshape(*shape, table.dim))
            else:
                found.append(_pooled(rows, ids, shape, each, env))
        return found

    def _checked(self, ids: np.ndarray, each: Mapping[str, Any], table: Table) -> tuple[np.ndarray, np.ndarray | None]:
        """Valid ids, and a mask of those that are to become the table's default row (``None``: none)."""
        ids = ids.astype(np.int64, copy=False)
        if (ids.view(np.uint64) < table.rows).all():
            return ids, None
        if each["wrap_negative"]:
            ids = np.where(ids < 0, ids + table.rows, ids)
        wrong = (ids < 0) | (ids >= table.rows)
        count = int(wrong.sum())
        if not count:
            return ids, None
        if table.missing == "error":
            raise IdOutOfRange(
                f"id {int(ids[wrong][0])} is not a row of table '{table.name}', which has {table.rows} rows (ids 0 to {table.rows - 1}); "
                f"{count} of the {len(ids)} ids in {_name(each['ids'])} are out of range. Fix the ids, or export with missing={{'{table.name}': 'zeros'}}"
            )
        with self._lock:
            self.missing[table.name] += count
        if table.missing.startswith("row:"):
            return np.where(wrong, int(table.missing[4:]), ids), None
        return np.where(wrong, 0, ids), wrong


def _column_checks(every: Sequence[tuple[Mapping[str, Any], Table]]) -> list[tuple[str, Any, np.ndarray]]:
    """Inputs that are read column by column: (input, its columns, rows of each column's table), to check all of them at once."""
    limits: dict[str, dict[int, int]] = {}
    for each, table in every:
        source = each["ids"]
        for column in [source["column"]] if "column" in source else range(*source.get("columns", (0, 0))):
            known = limits.setdefault(source["input"], {})
            known[column] = min(known.get(column, table.rows), table.rows)
    found = []
    for name, known in limits.items():
        columns: Any = sorted(known)
        rows = np.array([known[c] for c in columns], dtype=np.uint64)
        if columns == list(range(columns[0], columns[-1] + 1)):
            columns = slice(columns[0], columns[-1] + 1)
        found.append((name, columns, rows))
    return found


def _read(env: Mapping[str, np.ndarray], source: Mapping[str, Any]) -> np.ndarray:
    if "column" in source:
        return env[source["input"]][:, source["column"]]
    if "columns" in source:
        start, stop = source["columns"]
        return env[source["input"]][:, start:stop]
    return env[source["pre"] if "pre" in source else source["input"]]


def _name(source: Mapping[str, Any]) -> str:
    if "pre" in source:
        return "ids that the model computes"
    if "column" in source:
        return f"column {source['column']} of input '{source['input']}'"
    if "columns" in source:
        return f"columns {source['columns'][0]} to {source['columns'][1] - 1} of input '{source['input']}'"
    return f"input '{source['input']}'"


def _pooled(rows: np.ndarray, ids: np.ndarray, shape: tuple[int, ...], each: Mapping[str, Any], env: Mapping[str, np.ndarray]) -> np.ndarray:
    """``embedding_bag`` over decoded rows: sums, means or largest values by bag."""
    mode, padding = each["mode"], each["padding_idx"]
    weights = None if each["weights"] is None else _read(env, each["weights"])
    kept = None if padding is None else ids != padding
    if each["offsets"] is None:
        if shape[1] == 1 and kept is None and weights is None:
            return rows  # bags of one
        return _pooled_matrix(rows.reshape(*shape, rows.shape[1]), weights, None if kept is None else kept.reshape(shape), mode)
    if weights is not None and weights.shape != ids.shape:
        raise InputError(f"{_name(each['weights'])} has {weights.shape[0]} weights for {len(ids)} ids in {_name(each['ids'])}")
    starts, lengths = _bags(_read(env, each["offsets"]), len(ids), each)
    if weights is not None:
        rows = rows * weights[:, None]
    if kept is not None and not kept.all():
        before = np.concatenate([[0], np.cumsum(kept)])
        starts, lengths = before[starts], before[starts + lengths] - before[starts]
        rows = rows[kept]
    out = np.zeros((len(starts), rows.shape[1]), np.float32)
    full = np.flatnonzero(lengths)
    if len(full):
        rows = rows[: starts[full[-1]] + lengths[full[-1]]]
        out[full] = (np.maximum if mode == "max" else np.add).reduceat(rows, starts[full], axis=0)
    if mode == "mean":
        out /= np.maximum(lengths, 1)[:, None]
    return out


def _pooled_matrix(rows: np.ndarray, weights: np.ndarray | None, kept: np.ndarray | None, mode: str) -> np.ndarray:
    bags, length, dim = rows.shape
    if not length:
        return np.zeros((bags, dim), np.float32)
    count: Any = length
    if kept is not None and not kept.all():
        rows = np.where(kept[:, :, None], rows, np.float32(-np.inf if mode == "max" else 0))
        count = kept.sum(1)[:, None]
    if mode == "max":
        out = rows.max(1)
        return out if isinstance(count, int) else np.where(count > 0, out, np.float32(0))
    if weights is not None:
        rows = rows * weights[:, :, None]
    out = rows.sum(1)
    if mode == "mean":
        out /= np.maximum(count, 1).astype(np.float32)
    return out


def _bags(offsets: np.ndarray, n: int, each: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each bag of ``n`` ids. Raises :class:`InputError`."""
    name, offsets = _name(each["offsets"]), offsets.astype(np.int64, copy=False)
    if each["include_last_offset"] and not len(offsets):
        raise InputError(f"{name} is empty; with include_last_offset it needs one number more than there are bags")
    if len(offsets):
        if offsets[0] != 0:
            raise InputError(f"{name} starts at {offsets[0]}; offsets start at 0")
        if (np.diff(offsets) < 0).any():
            raise InputError(f"{name} decreases at position {int(np.argmax(np.diff(offsets) < 0)) + 1}; offsets never do")
        if offsets[-1] > n:
            raise InputError(f"{name} reaches {offsets[-1]}, and {_name(each['ids'])} has {n} ids")
    ends = offsets if each["include_last_offset"] else np.append(offsets, n)
    return ends[:-1], np.diff(ends)

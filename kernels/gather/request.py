"""From a request's ids to the rows that a dense graph reads: checks, one call of the store for all lookups, decoding, pooling.

numpy only. The meaning of each lookup is that of ``op.py``; what is done with an id that is no row is in ``Table.missing``.
"""
from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import IdOutOfRange, InputError, UnknownTable
from .known_ids import KnownIds
from .tables import Table, decode


class Store(Protocol):
    """Where rows come from. Stores behind a network have ``unique.py`` in front."""

    def lookup_many(self, requests: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        """For each (table, int64 ids ``[n]``) the stored rows ``[n, table.width]``, valid until the thread's next call."""
        ...

    def close(self) -> None:
        """Let go of connections and files."""
        ...


class _Block:
    """A join whose tables lie in one file and whose ids are columns of one input: a single gather fills it."""

    def __init__(self, join: Mapping[str, Any], rows: np.ndarray, firsts: np.ndarray, table: Table, source: str, columns: slice) -> None:
        self.name, self.stacked, self.members = join["rows"], join["stacked"], join["lookups"]
        self.rows, self.firsts, self.table, self.source, self.columns = rows, firsts, table, source, columns
        self._own = threading.local()

    def __call__(self, env: Mapping[str, np.ndarray]) -> np.ndarray:
        ids = env[self.source][:, self.columns] + self.firsts
        batch, count = ids.shape
        buffer = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < batch:  # memory that was used before costs no page faults
            buffer = self._own.buffer = np.empty((batch, count, self.table.width), self.table.stored)
        found = self.rows.take(ids, 0, buffer[:batch], "clip")
        values = decode(found.reshape(batch * count, self.table.width), self.table)
        return values.reshape((batch, count, self.table.dim) if self.stacked else (batch, count * self.table.dim))


class RemoteStore(Protocol):
    """What lies behind ``unique.py``: each table at most once, its ids different, and ascending where it has several shards; the rows are written to ``out``."""

    def lookup_many(self, requests: Sequence[tuple[str, np.ndarray]], out: list[np.ndarray]) -> list[np.ndarray]:
        """See :class:`Store`."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class Lookups:
    """All lookups of a model, on one store. ``described`` and ``joins``: as the manifest has them; ``defaults``: float32 ``[dim]`` for
    tables whose missing ids stand for zeros or the mean row; ``known``: the ids of tables whose ids are not their rows. ``missing`` counts
    the ids that are no row, by table. Thread-safe."""

    def __init__(
        self, described: Sequence[Mapping[str, Any]], joins: Sequence[Mapping[str, Any]], tables: Mapping[str, Table],
        defaults: Mapping[str, np.ndarray], store: Store, known: Mapping[str, KnownIds] | None = None,
    ) -> None:  # fmt: skip
        self._known = dict(known or {})
        for each in described:
            if each["table"] not in tables:
                raise UnknownTable(f"a lookup reads table '{each['table']}', which the manifest does not have: {', '.join(tables)}")
        self._all = [(each, tables[each["table"]]) for each in described]
        self._joins, self._defaults, self._store = joins, dict(defaults), store
        self._joined = {k for join in joins for k in join["lookups"]}
        self._columns = _column_checks(self._all, self._known)
        self._blocks = [block for join in joins if (block := self._block(join)) is not None]
        self._lock = threading.Lock()
        self.missing: Counter[str] = Counter()

    def _block(self, join: Mapping[str, Any]) -> _Block | None:
        members = [self._all[k][0] for k in join["lookups"]]
        columns = [_single_column(each) for each in members]
        source = members[0]["ids"].get("input")
        start = columns[0]
        if any(each["table"] in self._known for each in members):
            return None
        if start is None or columns != list(range(start, start + len(columns))) or any(each["ids"]["input"] != source for each in members):
            return None
        found = self._store.block([each["table"] for each in members]) if hasattr(self._store, "block") else None  # type: ignore[attr-defined]
        return None if found is None else _Block(join, *found, self._all[join["lookups"][0]][1], source, slice(start, start + len(columns)))

    def __call__(self, env: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows by the names of the dense graph's inputs; ``env``: inputs and computed ids by name. Valid until the thread's next call.

        Raises :class:`IdOutOfRange`, :class:`InputError` (offsets that make no bags), and what the store raises."""
        known_good = set()
        for name, columns, limits, width in self._columns:
            matrix = env[name]
            if matrix.shape[1] < width:
                raise InputError(f"input '{name}' has {matrix.shape[1]} columns; the model reads {width}")
            if matrix.dtype == np.int64 and (matrix[:, columns].view(np.uint64) < limits).all():
                known_good.add(name)
        blocks = [block for block in self._blocks if block.source in known_good]
        out = {block.name: block(env) for block in blocks}
        done = {k for block in blocks for k in block.members}
        if len(done) == len(self._all):
            return out
        found = self._fetched(env, [k for k in range(len(self._all)) if k not in done], known_good)
        for k, rows in found.items():
            if k not in self._joined:
                out[self._all[k][0]["rows"]] = rows
        for join in self._joins:
            if join["rows"] not in out:
                parts = [found[k] for k in join["lookups"]]
                out[join["rows"]] = np.stack(parts, 1) if join["stacked"] else np.concatenate(parts, 1)
        return out

    def _fetched(self, env: Mapping[str, np.ndarray], wanted: list[int], known_good: set[str]) -> dict[int, np.ndarray]:
        """The decoded, pooled rows of the lookups with these numbers."""
        requests, shapes, absent = [], [], []
        for k in wanted:
            each, table = self._all[k]
            source = each["ids"]
            ids = _read(env, source)
            shapes.append(ids.shape)
            flat, wrong = ids if ids.ndim == 1 else ids.reshape(-1), None
            if table.name in self._known:
                flat = self._numbered(flat, table.name)
            elif "pre" in source or len(source) == 1 or source["input"] not in known_good:
                flat, wrong = self._checked(flat, each, table)
            requests.append((table.name, flat))
            absent.append(wrong)
        stored = self._store.lookup_many(requests) if any(len(ids) for _, ids in requests) else [
            np.empty((0, self._all[k][1].width), self._all[k][1].stored) for k in wanted]  # fmt: skip
        found = {}
        for k, (_, ids), shape, wrong, rows in zip(wanted, requests, shapes, absent, stored):
            each, table = self._all[k]
            rows = decode(rows, table)
            if wrong is not None:
                rows = rows.copy() if rows.base is not None else rows
                rows[wrong] = self._defaults[table.name]
            if each["kind"] == "gather":
                found[k] = rows if len(shape) == 1 else rows.reshape(*shape, table.dim)
            else:
                found[k] = _pooled(rows, ids, shape, each, env)
        return found

    def _numbered(self, ids: np.ndarray, table: str) -> np.ndarray:
        """The rows of a table whose ids are not its rows."""
        rows, unknown = self._known[table].rows(ids.astype(np.int64, copy=False))
        if unknown:
            with self._lock:
                self.missing[table] += unknown
        return rows

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


def _single_column(each: Mapping[str, Any]) -> int | None:
    """The column whose ids a lookup takes one by one, if it is such a lookup."""
    ids = each["ids"]
    if each["kind"] == "gather":
        return ids.get("column")
    columns = ids.get("columns", (0, 0))
    plain = each["offsets"] is None and each["weights"] is None and each["padding_idx"] is None
    return columns[0] if plain and columns[1] - columns[0] == 1 else None


def _column_checks(every: Sequence[tuple[Mapping[str, Any], Table]], any_id: Container[str]) -> list[tuple[str, Any, np.ndarray, int]]:
    """Inputs that are read column by column: (input, its columns, rows of each column's table, columns that it must have), to check all of
    them at once. ``any_id``: tables that have no wrong ids."""
    limits: dict[str, dict[int, int]] = {}
    for each, table in every:
        source = each["ids"]
        limit = 2**64 - 1 if table.name in any_id else table.rows  # the id -1 then only takes the slower way
        for column in [source["column"]] if "column" in source else range(*source.get("columns", (0, 0))):
            known = limits.setdefault(source["input"], {})
            known[column] = min(known.get(column, limit), limit)
    found = []
    for name, known in limits.items():
        columns: Any = sorted(known)
        rows = np.array([known[c] for c in columns], dtype=np.uint64)
        if columns == list(range(columns[0], columns[-1] + 1)):
            columns = slice(columns[0], columns[-1] + 1)
        found.append((name, columns, rows, max(known) + 1))
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
    if "columns" in source and source["columns"][1] - source["columns"][0] == 1:
        return f"column {source['columns'][0]} of input '{source['input']}'"
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

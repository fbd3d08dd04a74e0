"""Criteo click logs: read them as batches of tensors, or write a file that looks like one.

Two formats are read, told apart by the first line; either may be gzipped:

  TSV as Criteo publishes it (Kaggle's train.txt, the Terabyte's day_0): no header; label, 13 integers,
      26 hexadecimal strings; any of the 39 features may be empty.
  CSV with the header `label,I1,...,I13,C1,...,C26` and the same columns.

Files are read as a stream, one batch at a time, so that their size does not matter.

    for dense, ids, labels in read_batches("train.txt", rows_per_table=[50_000] * 26, batch_size=2048):
        ...   # float32 (batch, 13), int64 (batch, 26), float32 (batch,)
"""

import gzip
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DENSE = 13
CATEGORICAL = 26
COLUMNS = 1 + DENSE + CATEGORICAL
LONGEST_ID = 64  # bytes; Criteo's ids have 8. A longer one means that the file is something else.

Batch = tuple[Tensor, Tensor, Tensor]


class MalformedRow(ValueError):
    """A row that is not Criteo's; the message names the file, the line and what is wrong with it."""


# ---------------------------------------------------------------------------------------------- reading


def read_batches(
    path: str | os.PathLike,
    rows_per_table: Sequence[int],
    batch_size: int,
    skip: int = 0,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yields (dense, ids, labels) in the order of the file, leaving out `skip` rows, then at most `limit` rows."""
    if len(rows_per_table) != CATEGORICAL:
        raise ValueError(f"rows_per_table has {len(rows_per_table)} entries; Criteo has {CATEGORICAL} tables")
    with _open(path) as file:
        separator, has_header = _dialect(file.peek(4096))
        first_line = 1 + has_header + skip
        stop = None if limit is None else has_header + skip + limit
        lines = itertools.islice(file, has_header + skip, stop)
        while chunk := list(itertools.islice(lines, batch_size)):
            yield parse(chunk, rows_per_table, separator, str(path), first_line)
            first_line += len(chunk)


def count_rows(path: str | os.PathLike, limit: int | None = None) -> int:
    """The number of rows, or `limit` if there are at least so many (then no more of the file is read)."""
    with _open(path) as file:
        _, has_header = _dialect(file.peek(4096))
        stop = None if limit is None else has_header + limit
        return sum(1 for _ in itertools.islice(file, has_header, stop))


def parse(
    lines: Sequence[bytes],
    rows_per_table: Sequence[int],
    separator: bytes = b"\t",
    source: str = "input",
    first_line: int = 1,
) -> Batch:
    """Turns lines into (dense, ids, labels). `source` and `first_line` are for error messages."""
    rows = [line.rstrip(b"\r\n").split(separator) for line in lines]
    try:
        if max(map(len, lines)) > COLUMNS * LONGEST_ID:
            raise ValueError
        columns = np.array(rows, dtype=bytes).T  # raises ValueError where rows differ in length
        if columns.shape[0] != COLUMNS or columns.dtype.itemsize > LONGEST_ID:
            raise ValueError
        labels = columns[0].astype(np.float32)
        if not np.isin(labels, (0.0, 1.0)).all():
            raise ValueError
        dense = transform_dense(columns[1 : 1 + DENSE].T)
    except ValueError:
        _blame(rows, source, first_line)  # slow and careful: finds the row that is at fault, and raises
        raise
    ids = hash_ids(columns[1 + DENSE :].T, rows_per_table)
    return torch.from_numpy(dense), torch.from_numpy(ids), torch.from_numpy(labels)


def transform_dense(text: np.ndarray) -> np.ndarray:
    """Numbers as bytes -> log(1 + x) as float32. Empty fields and negative numbers (Criteo's I2 has some) count as 0."""
    values = np.where(text == b"", b"0", text).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a number is not finite")
    return np.log1p(np.maximum(values, 0.0))


def hash_ids(text: np.ndarray, rows_per_table: Sequence[int]) -> np.ndarray:
    """Ids as bytes, (batch, tables) -> table rows as int64, the same today, tomorrow and on any machine.

    An empty field becomes row 0, which nothing else does. The hash is 64-bit FNV-1a over the bytes, then a
    multiplication and a shift so that its low bits are good; Python's own `hash` changes from run to run.
    """
    rows = np.asarray(rows_per_table, dtype=np.uint64)
    if (rows < 2).any():
        raise ValueError("every table needs at least 2 rows: one for missing values, one for the others")
    text = np.ascontiguousarray(text)
    letters = text.view(np.uint8).reshape(*text.shape, text.dtype.itemsize)
    hashed = np.full(text.shape, 0xCBF29CE484222325, dtype=np.uint64)
    for letter in np.moveaxis(letters, -1, 0):
        # numpy pads short strings with zero bytes: these are no part of the id.
        hashed = np.where(letter == 0, hashed, (hashed ^ letter) * np.uint64(0x100000001B3))
    ids = 1 + _mix(hashed) % (rows - np.uint64(1))
    return np.where(text == b"", np.uint64(0), ids).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit integers (the finaliser of splitmix64): every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _open(path: str | os.PathLike):
    return gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")


def _dialect(beginning: bytes) -> tuple[bytes, bool]:
    """(separator, whether there is a header), from the first bytes of the file."""
    line = beginning.split(b"\n", 1)[0]
    return (b"\t" if b"\t" in line else b","), line.startswith(b"label")


def _blame(rows: Sequence[Sequence[bytes]], source: str, first_line: int) -> None:
    """Raises MalformedRow for the first row that is wrong."""
    for number, row in enumerate(rows, start=first_line):
        problem = _problem(row)
        if problem:
            raise MalformedRow(f"{source}, line {number}: {problem}")


def _problem(row: Sequence[bytes]) -> str | None:
    if len(row) != COLUMNS:
        hint = " (a test set without labels?)" if len(row) == COLUMNS - 1 else ""
        return f"{len(row)} columns; expected {COLUMNS}: label, {DENSE} numbers, {CATEGORICAL} ids{hint}"
    try:
        label_ok = float(row[0]) in (0.0, 1.0)
    except ValueError:
        label_ok = False
    if not label_ok:
        return f"the label is {_show(row[0])}; expected 0 or 1"
    for k, field in enumerate(row[1 : 1 + DENSE], start=1):
        try:
            finite = np.isfinite(float(field or b"0"))
        except ValueError:
            finite = False
        if not finite:
            return f"I{k} is {_show(field)}; expected a number or nothing"
    for k, field in enumerate(row[1 + DENSE :], start=1):
        if len(field) > LONGEST_ID:
            return f"C{k} is {len(field)} bytes long; expected at most {LONGEST_ID}"
    return None


def _show(field: bytes) -> str:
    text = field.decode("utf-8", "replace")
    return repr(text if len(text) <= 20 else text[:20] + "...")


# ------------------------------------------------------------------------------------------- generating

# How many different values each of C1..C26 has in Criteo's Kaggle data set.
KAGGLE_VALUES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
SIGNAL = 2.2  # standard deviation of the planted logit: higher is easier to learn
BIAS = -1.8  # about a quarter of the rows are clicks, as in Kaggle's data


def write_synthetic(path: str | os.PathLike, rows: int, seed: int = 0, chunk: int = 50_000) -> Path:
    """Writes a TSV file like Criteo's, whose clicks can be learned.

    Ids follow a power law (Zipf exponents between 1.05 and 1.2, a different one for each column) over as many
    values as Kaggle's columns have. Each id has a hidden effect, each number a hidden weight; the sum of
    them is the logit from which the label is drawn. Same `rows` and `seed`: same file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    world = np.random.default_rng(seed)  # what is the same in every row: exponents, weights, shares
    exponents = world.uniform(1.05, 1.2, CATEGORICAL)
    id_weights = world.uniform(0.5, 1.5, CATEGORICAL)
    dense_weights = world.uniform(-1.0, 1.0, DENSE)
    scale = SIGNAL / np.sqrt((id_weights**2).sum() + (dense_weights**2).sum())
    missing = np.where(world.random(DENSE + CATEGORICAL) < 0.3, world.uniform(0.05, 0.5, DENSE + CATEGORICAL), 0.0)

    unfinished = path.with_name(path.name + ".unfinished")  # so that a file under its own name is a whole one
    with open(unfinished, "wb") as file:
        for start in range(0, rows, chunk):
            draw = np.random.default_rng([seed, start])
            n = min(chunk, rows - start)
            logit = np.full(n, BIAS)
            fields = []
            for k in range(DENSE):
                normal = draw.standard_normal(n)
                present = draw.random(n) >= missing[k]
                counts = np.floor(np.exp(1.5 * normal + 0.25 * k)).astype(np.int64)
                counts -= (k == 1) * draw.integers(0, 4, n)  # I2 is the column that also has negative numbers
                logit += scale * dense_weights[k] * normal * present
                fields.append(np.where(present, counts.astype("S12"), b""))
            for k in range(CATEGORICAL):
                rank = _zipf(draw.random(n), KAGGLE_VALUES[k], exponents[k])
                present = draw.random(n) >= missing[DENSE + k]
                token = _mix(rank.astype(np.uint64) + np.uint64((k + 1) << 32) + np.uint64(seed << 40))
                effect = (token >> np.uint64(40)) / 2**24 * np.sqrt(12) - np.sqrt(3)  # uniform, variance 1
                logit += scale * id_weights[k] * effect * present
                fields.append(np.where(present, _hexadecimal(token & np.uint64(0xFFFFFFFF)), b""))
            clicked = draw.random(n) < 1 / (1 + np.exp(-logit))
            table = [clicked.astype(np.int64).astype("S1").tolist(), *(field.tolist() for field in fields)]
            file.writelines(b"\t".join(row) + b"\n" for row in zip(*table, strict=True))
    os.replace(unfinished, path)
    return path


def _zipf(uniform: np.ndarray, values: int, exponent: float) -> np.ndarray:
    """Ranks 0 .. values-1 with probability about (rank+1)**-exponent: the inverse of the continuous distribution."""
    power = 1.0 - exponent
    rank = (uniform * ((values + 1.0) ** power - 1.0) + 1.0) ** (1.0 / power) - 1.0
    return np.minimum(rank.astype(np.int64), values - 1)


def _hexadecimal(values: np.ndarray) -> np.ndarray:
    """32-bit integers -> eight hexadecimal digits each, as bytes."""
    return np.frombuffer(values.astype(">u4").tobytes().hex().encode(), dtype="S8")

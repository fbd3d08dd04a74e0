"""What one table-batched lookup does, as data: the tables, the lookups and where each result goes.

A :class:`GroupSpec` is the static half of one call of ``torch.ops.tablewright.embedding_bags``; the tensors (tables, ids,
offsets, weights) are the other half. It travels through the graph as a string (:meth:`GroupSpec.encode`), so that a graph
node stays an ordinary ATen-style call that can be printed, exported and compared; :func:`decode` caches by that string.

Vocabulary: a *lookup* reads one table with one tensor of ids. Several lookups may read one table (tied tables). Each lookup
writes its rows into a *slot*, one output tensor ``[*leading, width]``, starting at a *column*: lookups that a model
concatenates share a slot, and the concatenation disappears. *Extras* are dense tensors copied into a slot (the dense vector
that a DLRM concatenates with its embeddings).
"""
from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

GRADS = ("sparse", "dense", "none", "in_backward")
POOLINGS = ("none", "sum", "mean")


@dataclass(frozen=True)
class Table:
    """One table. ``grad`` says what the backward makes of it: a coalesced ``sparse`` gradient, a ``dense`` one, ``none``
    (frozen), or an update ``in_backward``."""

    name: str  # the plain model's parameter name, e.g. "user.embedding.weight"
    rows: int
    dim: int
    grad: str = "dense"


@dataclass(frozen=True)
class Lookup:
    """One read of a table.

    ``pooling`` "none": ids of any shape ``[*S]``, result ``[*S, dim]`` (nn.Embedding). "sum" and "mean": ids ``[N]`` with
    offsets ``[B]`` (``[B + 1]`` with ``include_last_offset``), or ids ``[B, L]`` without offsets; result ``[B, dim]``.
    ``padding_idx``: with "none" the row is read but gets no gradient; with "sum"/"mean" it is left out of the bag (and of
    its count). An empty bag is zero. ``padding_read`` (with "sum"): the padding row is summed like any other and only gets no
    gradient, as in the sum of ``nn.Embedding`` over a sequence. ``wrap_negative``: id ``-k`` means row ``rows - k``, as in
    ``weight[ids]``.
    """

    table: int
    name: str  # the plain model's module path (or "weight[ids]" form), for messages
    pooling: str
    slot: int
    column: int
    padding_idx: int | None = None
    include_last_offset: bool = False
    wrap_negative: bool = False
    padding_read: bool = False

    @property
    def left_out(self) -> int | None:
        """The row that the forward does not read (whatever is read, ``padding_idx`` is not trained)."""
        return None if self.pooling == "none" or self.padding_read else self.padding_idx


@dataclass(frozen=True)
class Extra:
    """A dense tensor ``[*leading, width]`` copied into a slot at ``column``."""

    slot: int
    column: int
    width: int


@dataclass(frozen=True)
class GroupSpec:
    """All static facts of one launch. ``slots[s]`` is the width of output ``s``. ``unmade``: the slots are not made, because their only
    reader looks the rows up itself (``kernels/lookup_dots``): they come as zeros without memory, and carry gradients. ``wide``: outputs
    of float16 and bfloat16 tables are widened to float32, and so are the gradients that come back."""

    tables: tuple[Table, ...]
    lookups: tuple[Lookup, ...]
    slots: tuple[int, ...]
    extras: tuple[Extra, ...] = ()
    unmade: bool = False
    wide: bool = False

    def encode(self) -> str:
        """The canonical text of this spec: compact JSON, field order fixed."""
        raw = asdict(self)
        if not self.wide:
            del raw["wide"]
        return json.dumps(raw, separators=(",", ":"))


@functools.lru_cache(maxsize=4096)
def decode(text: str) -> GroupSpec:
    """The spec that :meth:`GroupSpec.encode` wrote. Equal texts give the same object, so it can key other caches."""
    raw = json.loads(text)
    return GroupSpec(
        tables=tuple(Table(**t) for t in raw["tables"]),
        lookups=tuple(Lookup(**entry) for entry in raw["lookups"]),
        slots=tuple(raw["slots"]),
        extras=tuple(Extra(**e) for e in raw["extras"]),
        unmade=raw.get("unmade", False),
        wide=raw.get("wide", False),
    )

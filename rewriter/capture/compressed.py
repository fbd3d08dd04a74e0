"""Tables that a plan compresses: in the shell their modules become ones that look up smaller tables and put rows together from them.

Captures, methods and comparisons then see the same rows, and the lookups of the smaller tables are fused and trained like any others.

What is left of the plain table: ``weight`` computes it whole, as the model reads it, and the module's part of a ``state_dict()`` is that,
under the plain name. Its metadata (``state_dict()._metadata``, which ``torch.save`` keeps) carries the smaller tables: a ``load_state_dict``
that finds rows which are just what those give takes them bit for bit; any other rows are fitted (``kernels/compression.py``) in place.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import compression as fits
from ...kernels.codecs.op import decode, encode
from ...kernels.embedding.int8_rows import OP as INT8
from ..compression import Compression, Hashing, Int8Rows, MixedDim, ProductQuantization, QuotientRemainder
from .stored import OwnStorage

Look = Callable[[Tensor, Tensor, "int | None"], Tensor]  # (table, ids, padding_idx) -> rows or bags
_PARTS = "tablewright_parts"


class Compressed(OwnStorage):
    """A lookup of rows that are put together. ``tables``: the parts that lookups read, which a table optimizer trains."""

    tables: ClassVar[tuple[str, ...]] = ()
    kept, key = "compressed", "compress"
    num_embeddings: int
    padding_idx: int | None
    trains: bool  # the plain table's requires_grad

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts that are nearest to a plain table."""
        raise TypeError(f"{type(self).__name__} must define fit()")

    def read(self, ids: Tensor, look: Look) -> Tensor:
        """What the module gives for ids, where ``look`` reads a table."""
        raise TypeError(f"{type(self).__name__} must define read()")

    @property
    def weight(self) -> Tensor:
        """The whole table ``[rows, dim]``, as the model reads it, made anew at each call."""
        part = next(iter(self.parts().values()))
        return self.read(torch.arange(self.num_embeddings, device=part.device), lambda table, ids, _: F.embedding(ids, table))

    def parts(self) -> dict[str, Tensor]:
        """The smaller tables, by name."""
        return {name: t for name, t in [*self._parameters.items(), *self._buffers.items()] if t is not None}

    @torch.no_grad()
    def take(self, parts: dict[str, Tensor]) -> None:
        """Set the parts, in place."""
        for name, part in self.parts().items():
            part.copy_(parts[name])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight.detach()
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[_PARTS] = {name: part.detach().clone() for name, part in self.parts().items()}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """As the plain module loads; its ``weight`` then goes to the parts."""
        kept, problems = (self._parameters, self._buffers), len(error_msgs)
        current = self.weight.detach()
        self._parameters, self._buffers = {"weight": nn.Parameter(torch.empty_like(current))}, {}
        rest = strict, missing_keys, unexpected_keys, error_msgs
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
            loaded = self._parameters["weight"].detach()  # type: ignore[union-attr]
        finally:
            self._parameters, self._buffers = kept
        padding = self.padding_idx
        if prefix + "weight" in state_dict and not bool(torch.isfinite(loaded).all()):
            error_msgs.append(f"{prefix}weight holds numbers that are not finite, which would spread to other rows of this compressed table")
        elif prefix + "weight" in state_dict and isinstance(self, Int8) and too_wide(loaded):
            error_msgs.append(f"{prefix}weight has a row whose largest number less its smallest is beyond float32, which int8 rows cannot hold")
        elif prefix + "weight" in state_dict and isinstance(self, _Projected) and isinstance(self, nn.Embedding) and padding is not None and bool(loaded[padding].any()):
            error_msgs.append(f"row {padding} of {prefix}weight, its padding_idx, is not zero, which a projection of rows cannot meet")
        if prefix + "weight" in state_dict and len(error_msgs) == problems:
            self._take_rows(loaded.to(current), current, local_metadata.get(_PARTS, {}))

    def _take_rows(self, rows: Tensor, current: Tensor, parts: dict[str, Tensor]) -> None:
        if {n: (p.shape, p.dtype) for n, p in parts.items()} == {n: (p.shape, p.dtype) for n, p in self.parts().items()}:
            before = {n: p.detach().clone() for n, p in self.parts().items()}
            self.take(parts)
            if torch.equal(self.weight, rows):
                return
            self.take(before)
        if not torch.equal(rows, current):
            self.take(self.fit(rows))

    def _inside(self, ids: Tensor, places: Tensor, beyond: int = 0) -> Tensor:
        """``places``, but ids outside of the table stay what they are (or are ``beyond`` further away, where the smaller one has more rows):
        outside of the smaller one as well, whose lookup refuses them."""
        far = torch.where(ids < 0, ids, ids + beyond) if beyond > 0 else ids
        return torch.where((ids < 0) | (ids >= self.num_embeddings), far, places)

    def _behind(self, ids: Tensor, places: Tensor, last: int) -> Tensor:
        """``places``, but the padding row's is ``last``."""
        return places if self.padding_idx is None else torch.where(ids == self.padding_idx, last, places)


class _Hashed(Compressed):
    tables = ("hashed",)
    hashed: Tensor
    buckets: int

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        return {"hashed": fits.fit_hashed(weight, self.buckets, self.padding_idx)}

    def read(self, ids: Tensor, look: Look) -> Tensor:
        k = self.buckets
        return look(self.hashed, self._behind(ids, self._inside(ids, ids % k), k), None if self.padding_idx is None else k)


class _QuotientRemainder(Compressed):
    tables = ("quotient", "remainder")
    quotient: Tensor
    remainder: Tensor
    buckets: int
    multiply: bool

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.tables, fits.fit_quotient_remainder(weight, self.buckets, self.multiply, self.padding_idx)))

    def read(self, ids: Tensor, look: Look) -> Tensor:
        k, last = self.buckets, -(-self.num_embeddings // self.buckets)
        padding = (None, None) if self.padding_idx is None else (last, k)
        q = look(self.quotient, self._behind(ids, ids // k, last), padding[0])
        r = look(self.remainder, self._behind(ids, self._inside(ids, ids % k), k), padding[1])
        return q * r if self.multiply else q + r


class _Projected(Compressed):
    tables = ("base",)
    base: Tensor
    projection: Tensor
    narrow: int

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("base", "projection"), fits.fit_projected(weight, self.narrow, self.padding_idx)))

    def read(self, ids: Tensor, look: Look) -> Tensor:
        return look(self.base, ids, self.padding_idx) @ self.projection  # of a bag as well: it is linear


class _Quantized(Compressed):
    codebooks: Tensor
    codes: Tensor
    pieces: int

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("codebooks", "codes"), fits.fit_quantized(weight, self.pieces, self.padding_idx)))

    def read(self, ids: Tensor, look: Look) -> Tensor:
        last, size = fits.CENTROIDS, fits.CENTROIDS + 1
        codes = self.codes[ids.clamp(0, self.num_embeddings - 1)].long()
        found = []
        for part in range(self.pieces):
            places = self._behind(ids, codes.select(-1, part), last)
            places = places + part * size if part else self._inside(ids, places, self.pieces * size - self.num_embeddings)
            found.append(look(self.codebooks, places, None if self.padding_idx is None else part * size + last))
        return torch.cat(found, -1)


def too_wide(rows: Tensor) -> bool:
    """Is a row's scale in int8 beyond float32?"""
    return bool(rows.numel()) and not bool((rows.amax(1) - rows.amin(1)).isfinite().all())


class Int8(Compressed):
    """Rows of int8 codes with a scale and an offset, which lookups read as they are."""

    tables = ("int8",)
    kept, key = "stored in int8", "dtype"
    int8: Tensor
    embedding_dim: int

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        return {"int8": encode(weight, "int8")}

    @property
    def weight(self) -> Tensor:
        return decode(self.int8, "int8", self.embedding_dim)


class _Rows(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return self.read(input, lambda table, ids, padding: F.embedding(ids, table, padding, sparse=self.sparse))  # type: ignore[attr-defined]


class _Bags(nn.EmbeddingBag):
    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        def look(table: Tensor, ids: Tensor, padding: int | None) -> Tensor:
            return F.embedding_bag(
                ids, table, offsets, mode=self.mode, sparse=self.sparse, per_sample_weights=per_sample_weights,
                include_last_offset=self.include_last_offset, padding_idx=padding,
            )  # fmt: skip

        return self.read(input, look)  # type: ignore[attr-defined]


class HashedEmbedding(_Hashed, _Rows):
    """nn.Embedding by the hashing trick."""


class HashedBag(_Hashed, _Bags):
    """nn.EmbeddingBag by the hashing trick."""


class QuotientRemainderEmbedding(_QuotientRemainder, _Rows):
    """nn.Embedding by the quotient-remainder trick."""


class QuotientRemainderBag(_QuotientRemainder, _Bags):
    """nn.EmbeddingBag by the quotient-remainder trick; it adds, as a sum of products is no product of sums."""


class ProjectedEmbedding(_Projected, _Rows):
    """nn.Embedding of narrower rows."""


class ProjectedBag(_Projected, _Bags):
    """nn.EmbeddingBag of narrower rows; bags are projected."""


class QuantizedEmbedding(_Quantized, _Rows):
    """nn.Embedding of product-quantized rows."""


class QuantizedBag(_Quantized, _Bags):
    """nn.EmbeddingBag of product-quantized rows."""


class Int8Embedding(Int8, nn.Embedding):
    """nn.Embedding over int8 rows."""

    def forward(self, input: Tensor) -> Tensor:
        return INT8(self.int8, input)


class Int8Bag(Int8, nn.EmbeddingBag):
    """nn.EmbeddingBag over int8 rows: sums and means."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        padding = -1 if self.padding_idx is None else self.padding_idx
        return INT8(self.int8, input, offsets, per_sample_weights, self.mode, padding, self.include_last_offset)


_FORMS: dict[type[Compression], tuple[type, type]] = {
    Hashing: (HashedEmbedding, HashedBag),
    QuotientRemainder: (QuotientRemainderEmbedding, QuotientRemainderBag),
    MixedDim: (ProjectedEmbedding, ProjectedBag),
    ProductQuantization: (QuantizedEmbedding, QuantizedBag),
    Int8Rows: (Int8Embedding, Int8Bag),
}


def compress(modules: list[nn.Module], how: Compression) -> Compressed:
    """Turn modules (nn.Embedding and nn.EmbeddingBag) that share one table into such ones, with one set of parts; returns the first.

    Their class and tensors change, in place; the table itself does not."""
    table = modules[0]._parameters["weight"]
    assert table is not None
    facts: dict[str, Any] = {"trains": table.requires_grad}
    facts |= {
        Hashing: lambda: {"buckets": how.rows}, QuotientRemainder: lambda: {"buckets": how.buckets, "multiply": how.combine == "multiply"},
        MixedDim: lambda: {"narrow": how.dim}, ProductQuantization: lambda: {"pieces": how.parts}, Int8Rows: dict,
    }[type(how)]()  # fmt: skip
    made: tuple[dict, dict] | None = None
    for module in modules:
        module.__class__ = _FORMS[type(how)][isinstance(module, nn.EmbeddingBag)]
        module.__dict__.update(facts)
        assert isinstance(module, Compressed)
        if made is None:
            parts = module.fit(table.detach())
            frozen = isinstance(module, (_Quantized, Int8))
            made = ({}, parts) if frozen else ({n: nn.Parameter(p, requires_grad=table.requires_grad) for n, p in parts.items()}, {})
        module.__dict__["_parameters"], module.__dict__["_buffers"] = dict(made[0]), dict(made[1])
    return modules[0]  # type: ignore[return-value]


def restore_plain(model: nn.Module, kinds: type[Compressed] = Compressed) -> None:
    """Undo :func:`compress` in a copy of a shell, for these ``kinds``: plain modules, with tables as the model reads them."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, kinds):
            first = next(iter(module.parts().values()))
            trains = first.requires_grad if isinstance(first, nn.Parameter) else module.trains
            if id(first) not in made:
                made[id(first)] = nn.Parameter(module.weight.detach(), requires_grad=trains)
            module.__dict__["_parameters"], module.__dict__["_buffers"] = {"weight": made[id(first)]}, {}
            for name in ("trains", "buckets", "multiply", "narrow", "pieces"):
                module.__dict__.pop(name, None)
            module.__class__ = nn.EmbeddingBag if isinstance(module, nn.EmbeddingBag) else nn.Embedding

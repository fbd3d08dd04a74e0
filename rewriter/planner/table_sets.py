"""Published sets of tables, for simulation and for comparing planners: sizes, hots and dense parts as their authors give them."""
from __future__ import annotations

import math
from dataclasses import dataclass

from ...passes.cost import Cost
from .facts import TableFacts, with_law
from .model_facts import ModelFacts

_DLRM = ((512, 256, 128), (1024, 1024, 512, 256, 1))
_CRITEO = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976, 14, 40000000,
    40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip
_HOTS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)


@dataclass(frozen=True)
class Tables:
    """``count`` equal tables: of each sample ``ids`` ids are looked up, in ``bags`` bags (features that share the table)."""

    count: int
    rows: int
    dim: int
    ids: int
    bags: int = 1


@dataclass(frozen=True)
class TableSet:
    """``alpha``: the exponent of Zipf's law that ids follow. ``batch``: samples of one rank. ``itemsize``: bytes of a value; ``state`` and
    ``row_state``: bytes of optimizer state for each value and row. ``bottom`` and ``top``: the MLPs' layers over ``dense`` numbers and over all
    embeddings; ``cross``: layers and rank of a low-rank cross network; ``dot``: a dot interaction of all features."""

    name: str
    groups: tuple[Tables, ...]
    source: str
    alpha: float = 1.1
    batch: int = 8192
    itemsize: int = 4
    state: float = 0.0
    row_state: float = 0.0
    dense: int = 13
    bottom: tuple[int, ...] = _DLRM[0]
    top: tuple[int, ...] = _DLRM[1]
    cross: tuple[int, int] | None = None
    dot: bool = False

    def tables(self, batch: int | None = None) -> list[TableFacts]:
        """The facts of each table at ``batch`` samples a rank."""
        batch = batch or self.batch
        made = [
            with_law(f"{g}", t.rows, t.dim, batch * t.ids, batch * t.bags, alpha=self.alpha, itemsize=self.itemsize, state=self.state,
                     row_state=self.row_state) for g, t in enumerate(self.groups)
        ]  # fmt: skip
        names = ((f, t, i) for f, t in zip(made, self.groups) for i in range(t.count))
        return [TableFacts(**{**vars(f), "name": f"t{f.name}" if t.count == 1 else f"t{f.name}.{i}"}) for f, t, i in names]

    def facts(self, batch: int | None = None) -> ModelFacts:
        """Tables and dense part."""
        batch = batch or self.batch
        width = (self.bottom or (self.dense,))[-1] + sum(t.count * t.dim * t.bags for t in self.groups)
        layers = [*_layers(self.dense, self.bottom)]
        extra = 0.0
        if self.cross is not None:
            layers += [(width, self.cross[1]), (self.cross[1], width)] * self.cross[0]
        if self.dot:
            features = 1 + sum(t.count * t.bags for t in self.groups)
            extra = 2.0 * batch * self.bottom[-1] * features * (features - 1) / 2
            width = self.bottom[-1] + features * (features - 1) // 2
        layers += _layers(width, self.top)
        flops = sum(2.0 * batch * i * o for i, o in layers) + extra
        weights = float(sum((i + 1) * o for i, o in layers) * self.itemsize)
        made = float(sum(batch * o for _, o in layers) * self.itemsize + batch * width * self.itemsize)
        forward = Cost(weights + made, made, flops, calls=len(layers) * 2)
        backward = Cost(2 * weights + 2 * made, weights + made, 2 * flops, calls=len(layers) * 3)
        return ModelFacts(self.tables(batch), {}, batch, forward, backward, weights, 3 * weights + made, [f"ids by Zipf's law, exponent {self.alpha}"])


def _layers(width: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip((width, *sizes), sizes))


def _groups(*of: tuple[int, ...]) -> tuple[Tables, ...]:
    return tuple(Tables(*each) for each in of)


def _columns(counts, rows, ids, dims) -> tuple[Tables, ...]:
    return tuple(Tables(c, r, d, i) for c, r, d, i in zip(counts, rows, dims, ids))


_EMBARK = "NVIDIA-Merlin/HugeCTR, benchmarks/embedding_collection (Liu et al., EMBark, RecSys 2024); its dense part is not given: DLRM's MLPs here"
_SYNTHETIC = "NVIDIA-Merlin/distributed-embeddings, examples/benchmarks/synthetic_models/config_v3.py"
_K, _M = 1000, 1000000


def _v3(name: str, groups: tuple[Tables, ...], mlp: tuple[int, ...], dense: int) -> TableSet:
    return TableSet(name, groups, _SYNTHETIC, 1.05, state=4, dense=dense, bottom=(), top=(*mlp, 1))


SETS = {s.name: s for s in (
    TableSet(
        "mlperf_dlrm_dcnv2", tuple(Tables(1, rows, 128, hot) for rows, hot in zip(_CRITEO, _HOTS)),
        "MLPerf training, DLRM-DCNv2 (mlcommons/training, recommendation_v2/torchrec_dlrm)", batch=6912, row_state=4, cross=(3, 512),
    ),
    TableSet(
        "dlrm_criteo1tb", tuple(Tables(1, rows, 128, 1) for rows in _CRITEO),
        "OneFlow OneEmbedding's DLRM: Criteo 1TB, 40M cap, mixed precision (rows travel and are computed with as fp16), SGD", batch=6912,
        itemsize=2, dot=True,
    ),
    TableSet(
        "180table_70B_hotness80", _columns(
            (5, 5, 5, 5, 20, 30, 10, 20, 10, 10, 10, 5, 40, 1, 1),
            (10 * _K, 4 * _M, 4 * _M, 50 * _M, _K, 10 * _K, 5 * _M, 4 * _M, 10, _K, 10 * _K, 100 * _K, 4 * _M, 50 * _M, 500 * _M),
            (100, 50, 30, 50, 50, 30, 20, 20, 100, 10, 100, 100, 200, 100, 100),
            (128, 64, 64, 32, 128, 128, 256, 128, 128, 64, 128, 64, 64, 128, 32)), _EMBARK,
    ),
    TableSet(
        "200table_100B_hotness20", _columns(
            (10, 10, 10, 10, 20, 10, 10, 10, 10, 10, 10, 20, 20, 10, 10, 10, 10),
            (100, _K, _K, 10 * _K, 10 * _K, 10 * _K, 100 * _K, _M, 2 * _M, 2 * _M, 4 * _M, 4 * _M, 2 * _M, 4 * _M, 4 * _M, 4 * _M, 50 * _M),
            (1, 1, 5, 20, 100, 1, 1, 1, 1, 1, 1, 1, 10, 20, 30, 50, 100),
            (128,) * 12 + (64, 128, 128, 128, 128)), _EMBARK,
    ),
    TableSet(
        "510table_110B_hotness5", _columns(
            (100, 150, 20, 50, 150, 20, 20), (_K, 100 * _K, _M, 2 * _M, 4 * _M, 4 * _M, 4 * _M), (1, 1, 1, 1, 1, 10, 100), (128,) * 7), _EMBARK,
    ),
    _v3("synthetic_small", _groups(
        (5, 10 * _K, 16, 31, 2), (3, 4 * _M, 32, 31, 2), (1, 50 * _M, 32, 31, 2), (1, 50 * _M, 32, 1), (30, 10, 16, 1), (30, _K, 16, 1),
        (5, 10 * _K, 16, 1), (5, 100 * _K, 32, 1), (27, 4 * _M, 32, 1)), (512, 256, 128), 10),
    _v3("synthetic_medium", _groups(
        (20, 100 * _K, 64, 51, 2), (5, 10 * _M, 64, 51, 2), (1, 100 * _M, 128, 51, 2), (1, 100 * _M, 128, 1), (80, 10, 32, 1), (60, _K, 32, 1),
        (80, 100 * _K, 64, 1), (24, 200 * _K, 64, 1), (40, 10 * _M, 64, 1)), (1024, 512, 256, 128), 25),
    _v3("synthetic_large", _groups(
        (40, 100 * _K, 64, 101, 2), (16, 15 * _M, 64, 101, 2), (1, 200 * _M, 128, 101, 2), (1, 200 * _M, 128, 1), (100, 10, 32, 1),
        (100, 10 * _K, 32, 1), (160, 100 * _K, 64, 1), (50, 500 * _K, 64, 1), (144, 15 * _M, 64, 1)), (2048, 1024, 512, 256), 100),
)}  # fmt: skip


def bytes_of(tables: list[TableFacts]) -> float:
    """Weights and optimizer state of all."""
    return math.fsum(t.bytes for t in tables)

"""DLRM, the deep learning recommendation model, in plain PyTorch.

    13 numbers ----> bottom MLP ----+
    26 ids --------> 26 tables -----+--> dot products of all pairs --> top MLP --> logit

Nothing here knows of Tablewright: it is the model as one would write it anyway (Naumov et al., 2019,
https://arxiv.org/abs/1906.00091; layer sizes of the MLPerf training benchmark). `train_dlrm.py` trains it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MLPERF_BOTTOM = (512, 256)  # then `dim`, which is 128 in MLPerf
MLPERF_TOP = (1024, 1024, 512, 256)  # then one logit


def mlp(sizes: Sequence[int], last_activation: bool) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them, and after the last one where asked."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*(layers if last_activation else layers[:-1]))


class DotInteraction(nn.Module):
    """Dot products between all pairs of feature vectors: (batch, features, dim) -> (batch, pairs)."""

    def __init__(self, features: int):
        super().__init__()
        self.pairs = features * (features - 1) // 2
        # The lower triangle without its diagonal, as two lists of indices: each pair once.
        rows, columns = torch.tril_indices(features, features, offset=-1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        return products[:, self.rows, self.columns]


class DLRM(nn.Module):
    """Click model over dense numbers and one id per categorical feature.

    Args:
        rows_per_table: number of rows of each table; its length is the number of categorical features.
        dim: width of every embedding vector, and of the bottom MLP's output.
        dense_features: how many numbers come with each row.
        bottom: hidden sizes of the bottom MLP.
        top: hidden sizes of the top MLP.
        mode: "sum" or "mean" makes the tables `nn.EmbeddingBag`; "single" makes them `nn.Embedding`.
              With one id per feature all three compute the same.
    """

    def __init__(
        self,
        rows_per_table: Sequence[int],
        dim: int = 128,
        dense_features: int = 13,
        bottom: Sequence[int] = MLPERF_BOTTOM,
        top: Sequence[int] = MLPERF_TOP,
        mode: str = "sum",
    ):
        super().__init__()
        if mode not in ("sum", "mean", "single"):
            raise ValueError(f"mode is {mode!r}; it must be 'sum', 'mean' or 'single'")
        self.pooled = mode != "single"
        if self.pooled:
            self.tables = nn.ModuleList(nn.EmbeddingBag(rows, dim, mode=mode) for rows in rows_per_table)
        else:
            self.tables = nn.ModuleList(nn.Embedding(rows, dim) for rows in rows_per_table)
        for table in self.tables:
            nn.init.uniform_(table.weight, -(table.num_embeddings**-0.5), table.num_embeddings**-0.5)

        self.bottom = mlp([dense_features, *bottom, dim], last_activation=True)
        self.interaction = DotInteraction(1 + len(self.tables))
        self.top = mlp([dim + self.interaction.pairs, *top, 1], last_activation=False)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """dense: (batch, dense_features) float; ids: (batch, tables) integer. Returns (batch,) logits."""
        x = self.bottom(dense)
        vectors = [x]
        for k, table in enumerate(self.tables):
            # An EmbeddingBag takes bags of ids, (batch, ids per bag): here bags of one.
            vectors.append(table(ids[:, k : k + 1] if self.pooled else ids[:, k]))
        pairs = self.interaction(torch.stack(vectors, dim=1))
        return self.top(torch.cat([x, pairs], dim=1)).squeeze(1)

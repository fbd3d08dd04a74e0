"""Spotlight (its repository on PYTHONPATH) and TorchRec's own models (installed), which read KeyedJaggedTensors."""
from __future__ import annotations

import importlib.util

import torch
from torch import nn
from zoo_schema import DENSE, DIM, FIELDS, HISTORY, dense, ids, padded, zoo

SPOTLIGHT = ("spotlight_Pool", "spotlight_LSTM", "spotlight_CNN", "spotlight_CNN_deep", "spotlight_Mixture", "spotlight_Bilinear",
             "spotlight_Bloom", "spotlight_Bloom_LSTM")  # fmt: skip
TORCHREC = ("torchrec_DLRM", "torchrec_DLRM_DCN", "torchrec_DLRM_Projection", "torchrec_DeepFM", "torchrec_EBC_weighted")
NAMES = tuple(n for n in (*SPOTLIGHT, *TORCHREC) if importlib.util.find_spec(n.partition("_")[0]))


class Scored(nn.Module):
    """A Spotlight sequence network called as Spotlight calls it: the user's representation, then scores of the next items."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        user, _ = self.net.user_representation(sequences)
        return self.net(user, sequences)


class Weighted(nn.Module):
    """A weighted TorchRec collection with a linear layer."""

    def __init__(self, bags: nn.Module, width: int) -> None:
        super().__init__()
        self.bags, self.over = bags, nn.Linear(width, 1)

    def forward(self, features) -> torch.Tensor:
        return self.over(self.bags(features).values())


def spotlight(name: str, rows: int) -> nn.Module:
    from spotlight.factorization.representations import BilinearNet
    from spotlight.layers import BloomEmbedding
    from spotlight.sequence.representations import CNNNet, LSTMNet, MixtureLSTMNet, PoolNet

    def bloom() -> nn.Module:
        return BloomEmbedding(rows, DIM, compression_ratio=0.5, num_hash_functions=2)

    return {
        "Pool": lambda: Scored(PoolNet(rows, DIM)), "LSTM": lambda: Scored(LSTMNet(rows, DIM)), "CNN": lambda: Scored(CNNNet(rows, DIM)),
        "CNN_deep": lambda: Scored(CNNNet(rows, DIM, kernel_width=3, dilation=(1, 2), num_layers=2)),
        "Mixture": lambda: Scored(MixtureLSTMNet(rows, DIM)), "Bilinear": lambda: BilinearNet(rows, rows, DIM),
        "Bloom": lambda: BilinearNet(rows, rows, DIM, user_embedding_layer=bloom(), item_embedding_layer=bloom()),
        "Bloom_LSTM": lambda: Scored(LSTMNet(rows, DIM, item_embedding_layer=bloom())),
    }[name.partition("_")[2]]()  # fmt: skip


def bags_of(rows: int, weighted: bool = False) -> nn.Module:
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

    tables = [EmbeddingBagConfig(name=f"t{k}", embedding_dim=DIM, num_embeddings=rows, feature_names=[f"f{k}"]) for k in range(FIELDS)]
    return EmbeddingBagCollection(tables=tables, is_weighted=weighted)


def make(name: str, rows: int) -> nn.Module:
    if name in SPOTLIGHT:
        return spotlight(name, rows)
    from torchrec.models import deepfm, dlrm

    if name == "torchrec_EBC_weighted":
        return Weighted(bags_of(rows, weighted=True), FIELDS * DIM)
    if name == "torchrec_DeepFM":
        return deepfm.SimpleDeepFMNN(DENSE, bags_of(rows), hidden_layer_size=32, deep_fm_dimension=8)
    same = dict(embedding_bag_collection=bags_of(rows), dense_in_features=DENSE, dense_arch_layer_sizes=[32, DIM], over_arch_layer_sizes=[32, 1])
    if name == "torchrec_DLRM":
        return dlrm.DLRM(**same)
    if name == "torchrec_DLRM_DCN":
        return dlrm.DLRM_DCN(**same, dcn_num_layers=2, dcn_low_rank_dim=8)
    return dlrm.DLRM_Projection(**same, interaction_branch1_layer_sizes=[4 * DIM], interaction_branch2_layer_sizes=[4 * DIM])


def inputs(name: str, rows: int, size: int, seed: int):
    if name in ("spotlight_Bilinear", "spotlight_Bloom"):
        return ids(size, rows, seed), ids(size, rows, seed + 1)
    if name in SPOTLIGHT:
        return padded(size, HISTORY, rows, seed, left=True)
    from torchrec import KeyedJaggedTensor

    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (FIELDS * size,), generator=g)
    values = torch.randint(0, rows, (int(lengths.sum()),), generator=g)
    weights = torch.rand(len(values), generator=g) if "weighted" in name else None
    features = KeyedJaggedTensor(keys=[f"f{k}" for k in range(FIELDS)], values=values, lengths=lengths, weights=weights)
    return (features,) if "weighted" in name else (dense(size, seed), features)


MODELS = zoo(make, NAMES, inputs)

"""pytorch-fm (``torchfm``): 16 models that read one int64 matrix [batch, fields]."""
from __future__ import annotations

import numpy as np
import torch
from torch import nn
from zoo_schema import DIM, FIELDS, ids, zoo

if not hasattr(np, "long"):  # gone from numpy 1.24 to 1.26
    np.long = np.int64  # type: ignore[attr-defined]

MLP, P = (32, 16), 0.2
NAMES = ("LR", "FM", "HOFM", "FFM", "FNN", "WD", "IPNN", "OPNN", "DCN", "FNFM", "DFM", "XDFM", "AFM", "AFI", "NFM", "NCF", "AFN")
NEEDS = ("torchfm",)


def make(name: str, rows: int) -> nn.Module:
    from torchfm.model import afi, afm, afn, dcn, dfm, ffm, fm, fnfm, fnn, hofm, lr, ncf, nfm, pnn, wd, xdfm

    dims = [rows] * FIELDS
    return {
        "LR": lambda: lr.LogisticRegressionModel(dims),
        "FM": lambda: fm.FactorizationMachineModel(dims, DIM),
        "HOFM": lambda: hofm.HighOrderFactorizationMachineModel(dims, 3, DIM),
        "FFM": lambda: ffm.FieldAwareFactorizationMachineModel(dims, 4),
        "FNN": lambda: fnn.FactorizationSupportedNeuralNetworkModel(dims, DIM, MLP, P),
        "WD": lambda: wd.WideAndDeepModel(dims, DIM, MLP, P),
        "IPNN": lambda: pnn.ProductNeuralNetworkModel(dims, DIM, MLP, P, "inner"),
        "OPNN": lambda: pnn.ProductNeuralNetworkModel(dims, DIM, MLP, P, "outer"),
        "DCN": lambda: dcn.DeepCrossNetworkModel(dims, DIM, 3, MLP, P),
        "FNFM": lambda: fnfm.FieldAwareNeuralFactorizationMachineModel(dims, 4, MLP, (P, P)),
        "DFM": lambda: dfm.DeepFactorizationMachineModel(dims, DIM, MLP, P),
        "XDFM": lambda: xdfm.ExtremeDeepFactorizationMachineModel(dims, DIM, MLP, P, (16, 16)),
        "AFM": lambda: afm.AttentionalFactorizationMachineModel(dims, DIM, 16, (P, P)),
        "AFI": lambda: afi.AutomaticFeatureInteractionModel(dims, DIM, 64, 2, 3, MLP, (0.0, 0.0, 0.0)),
        "NFM": lambda: nfm.NeuralFactorizationMachineModel(dims, DIM, MLP, (P, P)),
        "NCF": lambda: ncf.NeuralCollaborativeFiltering(dims, np.array((0,)), np.array((1,)), DIM, (16, 16), P),
        "AFN": lambda: afn.AdaptiveFactorizationNetwork(dims, DIM, 64, MLP, (0.0, 0.0, 0.0)),
    }[name]()


def inputs(name: str, rows: int, size: int, seed: int) -> torch.Tensor:
    return torch.stack([ids(size, rows, seed + 10 * k, low=0) for k in range(FIELDS)], dim=1)


MODELS = zoo(make, NAMES, inputs)

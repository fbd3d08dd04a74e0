"""DeepCTR-Torch: models that read one packed float matrix, columns cut out by name."""
from __future__ import annotations

import torch
from torch import nn
from zoo_schema import BAG, DENSE, DIM, FIELDS, HISTORY, dense, ids, lengths_of, padded, zoo

KEYS = dict(init_std=0.1)
SEQUENCE = ("DIN", "DIN_softmax", "DIEN_GRU", "DIEN_AIGRU", "DIEN_AGRU", "DIEN_AUGRU", "DIEN_negsample")
NAMES = (
    "AFM", "AFM_noatt", "AFN", "AutoInt", "CCPM", "DCN_vector", "DCN_matrix", "DCNMix", "DeepFM", "DIFM", "FiBiNET",
    "FiBiNET_all", "FiBiNET_each", "IFM", "MLR", "NFM", "ONN", "PNN_inner", "PNN_outer", "WDL", "xDeepFM",
    "ESMM", "MMOE", "PLE", "SharedBottom", *SEQUENCE,
)  # fmt: skip
NEEDS = ("deepctr_torch",)


def columns(name: str, rows: int) -> list:
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat

    dim = DIM
    fixed = [SparseFeat(f"c{k}", rows, dim) for k in range(FIELDS)]
    numbers = [DenseFeat(f"d{k}", 1) for k in range(DENSE)]
    if name in SEQUENCE:
        item, kind = SparseFeat("item", rows, dim), SparseFeat("kind", rows, dim)
        history = [
            VarLenSparseFeat(SparseFeat(f"hist_{n}", rows, dim, embedding_name=n), HISTORY, length_name="length") for n in ("item", "kind")
        ]
        if name == "DIEN_negsample":
            history += [
                VarLenSparseFeat(SparseFeat(f"neg_hist_{n}", rows, dim, embedding_name=n), HISTORY, length_name="length")
                for n in ("item", "kind")
            ]
        return [*fixed, item, kind, *numbers, *history]
    bags = [
        VarLenSparseFeat(SparseFeat("tags", rows, dim), BAG, "mean"),
        VarLenSparseFeat(SparseFeat("words", rows, dim), BAG, "sum", length_name="words_length"),
    ]
    if name.startswith("AFM") or name in ("CCPM", "ONN"):  # take no dense features here; ONN no sequences either
        numbers, bags = numbers if name == "ONN" else [], [] if name == "ONN" else bags
    return [*fixed, *numbers, *bags]


def make(name: str, rows: int) -> nn.Module:
    from deepctr_torch import models as zoo_models

    c = columns(name, rows)
    behavior = ["item", "kind"]
    both = {
        "AFM": lambda: zoo_models.AFM(c, c, **KEYS), "AFM_noatt": lambda: zoo_models.AFM(c, c, use_attention=False, **KEYS),
        "AFN": lambda: zoo_models.AFN(c, c, **KEYS), "AutoInt": lambda: zoo_models.AutoInt(c, c, **KEYS),
        "CCPM": lambda: zoo_models.CCPM(c, c, **KEYS), "DCN_vector": lambda: zoo_models.DCN(c, c, **KEYS),
        "DCN_matrix": lambda: zoo_models.DCN(c, c, cross_parameterization="matrix", **KEYS),
        "DCNMix": lambda: zoo_models.DCNMix(c, c, **KEYS), "DeepFM": lambda: zoo_models.DeepFM(c, c, **KEYS),
        "DIFM": lambda: zoo_models.DIFM(c, c, **KEYS), "FiBiNET": lambda: zoo_models.FiBiNET(c, c, **KEYS),
        "FiBiNET_all": lambda: zoo_models.FiBiNET(c, c, bilinear_type="all", **KEYS),
        "FiBiNET_each": lambda: zoo_models.FiBiNET(c, c, bilinear_type="each", **KEYS),
        "IFM": lambda: zoo_models.IFM(c, c, **KEYS), "MLR": lambda: zoo_models.MLR(c, **KEYS),
        "NFM": lambda: zoo_models.NFM(c, c, **KEYS), "ONN": lambda: zoo_models.ONN(c, c, **KEYS),
        "PNN_inner": lambda: zoo_models.PNN(c, **KEYS),
        "PNN_outer": lambda: zoo_models.PNN(c, use_inner=False, use_outter=True, **KEYS),
        "WDL": lambda: zoo_models.WDL(c, c, **KEYS), "xDeepFM": lambda: zoo_models.xDeepFM(c, c, **KEYS),
        "ESMM": lambda: zoo_models.ESMM(c, **KEYS), "MMOE": lambda: zoo_models.MMOE(c, **KEYS),
        "PLE": lambda: zoo_models.PLE(c, **KEYS), "SharedBottom": lambda: zoo_models.SharedBottom(c, **KEYS),
        "DIN": lambda: zoo_models.DIN(c, behavior, **KEYS),
        "DIN_softmax": lambda: zoo_models.DIN(c, behavior, att_weight_normalization=True, **KEYS),
        "DIEN_negsample": lambda: zoo_models.DIEN(c, behavior, use_negsampling=True, **KEYS),
    }  # fmt: skip
    if name.startswith("DIEN") and name not in both:
        return zoo_models.DIEN(c, behavior, gru_type=name.partition("_")[2], **KEYS)
    return both[name]()


def inputs(name: str, rows: int, size: int, seed: int) -> torch.Tensor:
    from deepctr_torch.inputs import build_input_features

    values = {f"c{k}": ids(size, rows, seed + 10 * k) for k in range(FIELDS)}
    values |= {f"d{k}": dense(size, seed)[:, k] for k in range(DENSE)}
    values |= {"item": ids(size, rows, seed + 91), "kind": ids(size, rows, seed + 92)}
    values |= {"tags": padded(size, BAG, rows, seed), "words": padded(size, BAG, rows, seed + 1)}
    values["hist_item"] = padded(size, HISTORY, rows, seed + 2)
    keep = values["hist_item"] != 0
    for k, n in enumerate(("hist_kind", "neg_hist_item", "neg_hist_kind")):
        values[n] = torch.randint(1, rows, keep.shape, generator=torch.Generator().manual_seed(seed + k)) * keep
    values |= {"length": lengths_of(values["hist_item"]), "words_length": lengths_of(values["words"])}
    order = build_input_features(columns(name, rows))
    return torch.cat([values[n].float().reshape(size, -1) for n in order], dim=1)


MODELS = zoo(make, NAMES, inputs)

"""FuxiCTR's model_zoo (its GitHub repository on PYTHONPATH): models that read a dict of named tensors, each from its own file."""
from __future__ import annotations

import importlib
import sys
import types
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from zoo_schema import BAG, DENSE, DIM, FIELDS, HISTORY, dense, ids, labels, padded, stand_in_for, zoo

stand_in_for("ray", "tensorflow", "keras_preprocessing")

MLP = [32, 16]
COMMON = dict(
    gpu=-1, verbose=0, model_root="/tmp", metrics=["AUC"], optimizer="adam", loss="binary_crossentropy", task="binary_classification",
    learning_rate=1e-3,
)  # fmt: skip
HIDDEN = dict(hidden_units=MLP)
DNN = dict(dnn_hidden_units=MLP)
CROSS = dict(parallel_dnn_hidden_units=MLP, stacked_dnn_hidden_units=MLP)
APG = dict(hypernet_config={"hidden_units": [16], "hidden_activations": "relu", "dropout_rates": 0}, rank_k=4, overparam_p=8)
HEADS = dict(num_tasks=2, task=["binary_classification"] * 2, loss=["binary_crossentropy"] * 2)
LONG = dict(embedding_dim=DIM, **DNN)

# name: (file under model_zoo, class, arguments)
TABLE: dict[str, tuple[str, str, dict]] = {
    "AFM": ("AFM/src/AFM", "AFM", {}), "AFN": ("AFN/src/AFN", "AFN", DNN), "AOANet": ("AOANet/src/AOANet", "AOANet", DNN),
    "APG_DCNv2": ("APG/src/APG_DCNv2", "APG_DCNv2", {**CROSS, **APG}), "APG_DeepFM": ("APG/src/APG_DeepFM", "APG_DeepFM", {**HIDDEN, **APG}),
    "AutoInt": ("AutoInt/src/AutoInt", "AutoInt", DNN), "CCPM": ("CCPM/src/CCPM", "CCPM", {}),
    "DCN": ("DCN/DCN_torch/src/DCN", "DCN", DNN), "DCN_crossonly": ("DCN/DCN_torch/src/DCN", "DCN", {}),
    "DCNv2": ("DCNv2/src/DCNv2", "DCNv2", CROSS), "DCNv2_mix": ("DCNv2/src/DCNv2", "DCNv2", {**CROSS, "use_low_rank_mixture": True}),
    "DCNv2_stacked": ("DCNv2/src/DCNv2", "DCNv2", {**CROSS, "model_structure": "stacked"}),
    "DESTINE": ("DESTINE/src/DESTINE", "DESTINE", DNN), "DLRM": ("DLRM/src/DLRM", "DLRM", dict(top_mlp_units=MLP, bottom_mlp_units=MLP)),
    "DNN": ("DNN/DNN_torch/src/DNN", "DNN", HIDDEN), "DNN_bn": ("DNN/DNN_torch/src/DNN", "DNN", {**HIDDEN, "batch_norm": True}),
    "DSSM": ("DSSM/src/DSSM", "DSSM", dict(user_tower_units=MLP, item_tower_units=MLP)),
    "DeepCrossing": ("DeepCrossing/src/DeepCrossing", "DeepCrossing", dict(residual_blocks=MLP)),
    "DeepFM": ("DeepFM/DeepFM_torch/src/DeepFM", "DeepFM", HIDDEN), "DeepIM": ("DeepIM/src/DeepIM", "DeepIM", {**HIDDEN, "im_order": 3}),
    "EDCN": ("EDCN/src/EDCN", "EDCN", {}), "EulerNet": ("EulerNet/src/EulerNet", "EulerNet", {}), "FFM": ("FFM/src/FFM", "FFM", {}),
    "FFMv2": ("FFM/src/FFMv2", "FFMv2", {}),
    "FGCNN": ("FGCNN/src/FGCNN", "FGCNN", dict(channels=[4, 4], kernel_heights=[3, 3], pooling_sizes=[2, 2], recombined_channels=[2, 2], **DNN)),
    "FLEN": ("FLEN/src/FLEN", "FLEN", DNN), "FM": ("FM/src/FM", "FM", {}), "FiBiNET": ("FiBiNET/src/FiBiNET", "FiBiNET", HIDDEN),
    "FiGNN": ("FiGNN/src/FiGNN", "FiGNN", {}),
    "DualMLP": ("FinalMLP/src/DualMLP", "DualMLP", dict(mlp1_hidden_units=MLP, mlp2_hidden_units=MLP)),
    "FinalMLP": ("FinalMLP/src/FinalMLP", "FinalMLP", dict(mlp1_hidden_units=MLP, mlp2_hidden_units=MLP, num_heads=2)),
    "FinalNet": ("FinalNet/src/FinalNet", "FinalNet", dict(block1_hidden_units=MLP, block2_hidden_units=MLP)),
    "FmFM": ("FmFM/src/FmFM", "FmFM", {}), "FmFM_vec": ("FmFM/src/FmFM", "FmFM", dict(field_interaction_type="vectorized")),
    "FwFM": ("FwFM/src/FwFM", "FwFM", {}), "GDCN": ("GDCN/src/GDCN", "GDCN", DNN), "GDCNP": ("GDCN/src/GDCN", "GDCNP", DNN),
    "HFM": ("HFM/src/HFM", "HFM", {}), "HOFM": ("HOFM/src/HOFM", "HOFM", {}), "InterHAt": ("InterHAt/src/InterHAt", "InterHAt", {}),
    "LR": ("LR/src/LR", "LR", {}), "LorentzFM": ("LorentzFM/src/LorentzFM", "LorentzFM", {}),
    "MaskNet": ("MaskNet/src/MaskNet", "MaskNet", DNN),
    "MaskNet_parallel": ("MaskNet/src/MaskNet", "MaskNet", {**DNN, "model_type": "ParallelMaskNet", "parallel_num_blocks": 2}),
    "NFM": ("NFM/src/NFM", "NFM", HIDDEN), "ONN": ("ONN/ONN_torch/src/ONN", "ONN", HIDDEN), "ONNv2": ("ONN/ONN_torch/src/ONNv2", "ONNv2", HIDDEN),
    "PPNet": ("PEPNet/src/PPNet", "PPNet", {**HIDDEN, "gate_priors": ["c0", "c1"]}), "PNN": ("PNN/src/PNN", "PNN", HIDDEN),
    "SAM": ("SAM/src/SAM", "SAM", {}),
    "WideDeep": ("WideDeep/WideDeep_torch/src/WideDeep", "WideDeep", HIDDEN),
    "WuKong": ("WuKong/src/WuKong", "WuKong", dict(embedding_dim=DIM, lcb_features=8, fmb_features=8)),
    "xDeepFM": ("xDeepFM/src/xDeepFM", "xDeepFM", DNN),
    "BST": ("BST/src/BST", "BST", DNN), "DIEN": ("DIEN/src/DIEN", "DIEN", DNN), "DIN": ("DIN/src/DIN", "DIN", DNN),
    "DMIN": ("DMIN/src/DMIN", "DMIN", DNN), "DMR": ("DMR/src/DMR", "DMR", {**DNN, "context_field": None}),
    "TransAct": ("TransAct/src/TransAct", "TransAct", dict(embedding_dim=DIM, dcn_hidden_units=MLP, mlp_hidden_units=MLP, dim_feedforward=32)),
    "MMoE": ("multitask/MMoE/src/MMoE", "MMoE", {**HEADS, "expert_hidden_units": MLP}),
    "PLE": ("multitask/PLE/src/PLE", "PLE", {**HEADS, "expert_hidden_units": MLP}),
    "ShareBottom": ("multitask/ShareBottom/src/ShareBottom", "ShareBottom", {**HEADS, "bottom_hidden_units": MLP}),
    "Long_DCNv2": ("LongCTR/DCNv2/DCNv2", "DCNv2", dict(embedding_dim=DIM, **CROSS)), "Long_DIEN": ("LongCTR/DIEN/DIEN", "DIEN", LONG),
    "Long_DIN": ("LongCTR/DIN/DIN", "DIN", LONG), "Long_ETA": ("LongCTR/ETA/ETA", "ETA", dict(topk=5, short_seq_len=8, **LONG)),
    "Long_FinalMLP": ("LongCTR/FinalMLP/FinalMLP", "FinalMLP", dict(embedding_dim=DIM, mlp1_hidden_units=MLP, mlp2_hidden_units=MLP)),
    "Long_MIRRN": ("LongCTR/MIRRN/MIRRN", "MIRRN", dict(topk=5, short_seq_len=8, max_len=HISTORY, **LONG)),
    "Long_SDIM": ("LongCTR/SDIM/SDIM", "SDIM", dict(short_seq_len=8, **LONG)),
    "Long_SIM": ("LongCTR/SIM/SIM", "SIM", dict(topk=5, short_seq_len=8, **LONG)),
    "Long_TWIN": ("LongCTR/TWIN/TWIN", "TWIN", dict(topk=5, short_seq_len=8, **LONG)),
    "Long_TransAct": ("LongCTR/TransAct/TransAct", "TransAct", dict(embedding_dim=DIM, dcn_hidden_units=MLP, mlp_hidden_units=MLP, dim_feedforward=32)),
}  # fmt: skip
SEQUENCE = ("BST", "DIEN", "DIN", "DMIN", "DMR", "TransAct")
NEEDS = ("fuxictr",)


def feature_map(name: str, rows: int):
    from fuxictr.features import FeatureMap

    made = FeatureMap("zoo", "/tmp")
    sources = ("user", "user", "user", "item", "item", "item", "context", "context")

    def categorical(source: str, **more) -> dict:
        return {"source": source, "type": "categorical", "vocab_size": rows, "padding_idx": 0, **more}

    def sequence(encoder: str | None, length: int, **more) -> dict:
        spec = {"source": "user", "type": "sequence", "vocab_size": rows, "padding_idx": 0, "max_len": length, **more}
        return spec if encoder is None else {**spec, "feature_encoder": f"layers.{encoder}()"}

    features = {f"c{k}": categorical(sources[k]) for k in range(FIELDS)}
    if name.startswith("Long_"):
        features |= {"item_id": categorical("item"), "cate_id": categorical("item")}
        features = {k: {**v, "source": "user"} if k.startswith("c") and k[1:].isdigit() else v for k, v in features.items()}
    elif name in SEQUENCE:
        features |= {"item_id": categorical("item"), "cate_id": categorical("item")}
        plain = None
        features |= {
            "click_history": sequence(plain, HISTORY, share_embedding="item_id"),
            "cate_history": sequence(plain, HISTORY, share_embedding="cate_id"),
        }
        if name in ("DIEN", "DMIN", "DMR"):
            features |= {
                "neg_click_history": sequence(plain, HISTORY, share_embedding="item_id"),
                "neg_cate_history": sequence(plain, HISTORY, share_embedding="cate_id"),
            }
    else:
        features |= {"tags": sequence("MaskedAveragePooling", BAG), "words": sequence("MaskedSumPooling", BAG)}
        if name not in ("FFM", "ONN"):
            features |= {f"d{k}": {"source": "context", "type": "numeric"} for k in range(DENSE)}
    made.features = OrderedDict(features)
    made.labels = ["label", "label2"] if name in ("MMoE", "PLE", "ShareBottom") else ["label"]
    made.default_emb_dim = TABLE[name][2].get("embedding_dim", 16 if name == "DIEN" else 10)
    made.num_fields = made.get_num_fields()
    made.total_features = rows * made.num_fields
    made.set_column_index()
    return made


def make(name: str, rows: int) -> nn.Module:
    import fuxictr

    file, cls, extra = TABLE[name]
    folder, _, stem = file.rpartition("/")
    package = types.ModuleType(f"fuxictr_zoo_{folder.replace('/', '_')}")
    package.__path__ = [str(Path(fuxictr.__file__).parents[1] / "model_zoo" / folder)]
    sys.modules.setdefault(package.__name__, package)
    module = importlib.import_module(f"{package.__name__}.{stem}")
    model = getattr(module, cls)(feature_map(name, rows), model_id=name, **{**COMMON, **extra})
    for part in model.modules():  # DMR keeps a generator: it is empty after its first `in`, and no copy can be made of it
        if isinstance(getattr(part, "not_required_feature_columns", None), types.GeneratorType):
            part.not_required_feature_columns = list(part.not_required_feature_columns)
    return model


def inputs(name: str, rows: int, size: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    x = {f"c{k}": ids(size, rows, seed + 10 * k) for k in range(FIELDS)}
    if name.startswith("Long_"):
        history = padded(size, HISTORY, rows, seed + 2, left=True)
        items = {n: torch.cat([h, ids(size, rows, seed + 90)[:, None]], 1).flatten() for n, h in (("item_id", history), ("cate_id", history))}
        return ({**x, "label": labels(size, seed)}, items, (history > 0).float()),
    if name in SEQUENCE:
        history = padded(size, HISTORY, rows, seed + 2)
        x |= {"item_id": ids(size, rows, seed + 91), "cate_id": ids(size, rows, seed + 92), "click_history": history}
        others = ("cate_history", "neg_click_history", "neg_cate_history") if name in ("DIEN", "DMIN", "DMR") else ("cate_history",)
        for n in others:
            x[n] = torch.randint(1, rows, history.shape, generator=g) * (history != 0)
        return x
    x |= {"tags": padded(size, BAG, rows, seed), "words": padded(size, BAG, rows, seed + 1)}
    if name not in ("FFM", "ONN"):
        x |= {f"d{k}": dense(size, seed)[:, k : k + 1] if name == "DLRM" else dense(size, seed)[:, k] for k in range(DENSE)}
    return x


MODELS = zoo(make, tuple(TABLE), inputs)

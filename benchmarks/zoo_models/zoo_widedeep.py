"""pytorch-widedeep: tabular and recommendation models over one packed float matrix, some joined with a wide part."""
from __future__ import annotations

import torch
from torch import nn
from zoo_schema import DENSE, DIM, FIELDS, HISTORY, dense, ids, padded, stand_in_for, zoo

NEEDS = ("pytorch_widedeep",)
stand_in_for("spacy", "cv2", "torchvision", "transformers", "fastparquet", "sentence_transformers", "sentencepiece", "gensim")

CATEGORICAL = [f"c{k}" for k in range(FIELDS)]
CONTINUOUS = [f"d{k}" for k in range(DENSE)]
COLUMNS = {name: k for k, name in enumerate([*CATEGORICAL, *CONTINUOUS])}
ATTENTION = ("TabTransformer", "TabTransformer_shared", "SAINT", "FTTransformer", "TabFastFormer", "TabPerceiver", "SelfAttentionMLP", "ContextAttentionMLP")
NAMES = (
    "Wide", "TabMlp", "TabMlp_bn", "TabMlp_embcont", "TabResnet", "TabNet", *ATTENTION, "DCN", "DCNv2", "DCNv2_mix", "GDCN", "DeepFM", "DeepFFM",
    "xDeepFM", "AutoInt", "AutoIntPlus", "DIN", "WideDeep_TabMlp", "WideDeep_TabTransformer", "BasicRNN", "AttentiveRNN",
)  # fmt: skip


def make(name: str, rows: int) -> nn.Module:
    from pytorch_widedeep import models
    from pytorch_widedeep.models import rec

    wide = dict(column_idx=COLUMNS, cat_embed_input=[(c, rows - 1, DIM) for c in CATEGORICAL], continuous_cols=CONTINUOUS)
    same = dict(column_idx=COLUMNS, cat_embed_input=[(c, rows - 1) for c in CATEGORICAL], continuous_cols=CONTINUOUS)
    dims = [32, 16]
    if name in ATTENTION:
        kind, _, shared = name.partition("_")
        extra = {"shared_embed": True} if shared else {}
        extra |= {"n_latents": 4, "latent_dim": 16} if kind == "TabPerceiver" else {}
        extra |= {} if kind == "TabPerceiver" else {"n_blocks": 2}
        return getattr(models, kind)(**same, input_dim=DIM, **extra)
    history = [f"h{k}" for k in range(HISTORY)]
    columns = {n: k for k, n in enumerate([*CATEGORICAL, *CONTINUOUS, "item", *history])}
    no_cont = dict(column_idx={c: COLUMNS[c] for c in CATEGORICAL}, cat_embed_input=[(c, rows - 1) for c in CATEGORICAL])
    return {
        "Wide": lambda: models.Wide(FIELDS * rows), "TabMlp": lambda: models.TabMlp(**wide, mlp_hidden_dims=dims),
        "TabMlp_bn": lambda: models.TabMlp(**wide, mlp_hidden_dims=dims, mlp_batchnorm=True),
        "TabMlp_embcont": lambda: models.TabMlp(**wide, mlp_hidden_dims=dims, embed_continuous=True, embed_continuous_method="standard", cont_embed_dim=8),
        "TabResnet": lambda: models.TabResnet(**wide, blocks_dims=[32, 16]), "TabNet": lambda: models.TabNet(**wide, n_steps=2, step_dim=8, attn_dim=8),
        "DCN": lambda: rec.DeepCrossNetwork(**wide, n_cross_layers=3, mlp_hidden_dims=dims),
        "DCNv2": lambda: rec.DeepCrossNetworkV2(**wide, num_cross_layers=3, mlp_hidden_dims=dims, low_rank=8, num_experts=1),
        "DCNv2_mix": lambda: rec.DeepCrossNetworkV2(**wide, num_cross_layers=3, mlp_hidden_dims=dims, low_rank=8, num_experts=3),
        "GDCN": lambda: rec.GatedDeepCrossNetwork(**wide, num_cross_layers=3, mlp_hidden_dims=dims),
        "DeepFM": lambda: rec.DeepFactorizationMachine(**no_cont, num_factors=DIM, mlp_hidden_dims=dims),
        "DeepFFM": lambda: rec.DeepFieldAwareFactorizationMachine(**no_cont, num_factors=4, mlp_hidden_dims=dims),
        "xDeepFM": lambda: rec.ExtremeDeepFactorizationMachine(**no_cont, input_dim=DIM, cin_layer_dims=[8, 8], mlp_hidden_dims=dims),
        "AutoInt": lambda: rec.AutoInt(**no_cont, input_dim=DIM, num_heads=2, num_layers=2),
        "AutoIntPlus": lambda: rec.AutoIntPlus(**no_cont, input_dim=DIM, num_heads=2, num_layers=2, mlp_hidden_dims=dims),
        "DIN": lambda: rec.DeepInterestNetwork(
            column_idx=columns, user_behavior_confiq=(history, rows - 1, DIM), target_item_col="item",
            cat_embed_input=[(c, rows - 1, DIM) for c in CATEGORICAL], continuous_cols=CONTINUOUS, mlp_hidden_dims=dims),
        "WideDeep_TabMlp": lambda: models.WideDeep(models.Wide(FIELDS * rows), models.TabMlp(**wide, mlp_hidden_dims=dims)),
        "WideDeep_TabTransformer": lambda: models.WideDeep(models.Wide(FIELDS * rows), models.TabTransformer(**same, input_dim=DIM, n_blocks=1)),
        "BasicRNN": lambda: models.BasicRNN(vocab_size=rows, embed_dim=DIM, hidden_dim=16, n_layers=1, padding_idx=0),
        "AttentiveRNN": lambda: models.AttentiveRNN(vocab_size=rows, embed_dim=DIM, hidden_dim=16, n_layers=1, padding_idx=0),
    }[name]()  # fmt: skip


def inputs(name: str, rows: int, size: int, seed: int):
    if name.endswith("RNN"):
        return padded(size, HISTORY, rows, seed, left=True)
    codes = torch.stack([ids(size, rows, seed + 10 * k) for k in range(FIELDS)], 1)
    offset = codes + torch.arange(FIELDS) * rows
    table = torch.cat([codes.float(), dense(size, seed)], 1)
    if name == "Wide":
        return offset
    if name == "DIN":
        return torch.cat([table, ids(size, rows, seed + 90)[:, None].float(), padded(size, HISTORY, rows, seed).float()], 1)
    if name.startswith("WideDeep_"):
        return {"wide": offset, "deeptabular": table}
    return table


MODELS = zoo(make, NAMES, inputs)

"""torch-rechub: rankers, multi-task models, two-tower and sequence matchers, generative models. They read a dict of named tensors."""
from __future__ import annotations

import torch
from torch import nn
from zoo_schema import BAG, DENSE, DIM, FIELDS, HISTORY, dense, ids, padded, zoo

RANK = (
    "AFM", "AutoInt", "BST", "DCN", "DCNv2_mix", "DCNv2", "DCNv2_stacked", "DeepFFM", "FatDeepFFM", "DeepFM", "DIEN", "DIN", "EDCN",
    "EDCN_attention", "FiBiNet", "FiBiNet_all", "FiBiNet_each", "WideDeep",
)  # fmt: skip
TASKS = ("SharedBottom", "ESMM", "MMOE", "PLE", "AITM")
MATCH = (
    "DSSM", "DSSM_senet", "FaceBookDSSM", "YoutubeDNN", "YoutubeSBC", "MIND", "GRU4Rec", "NARM", "SASRec", "SINE", "STAMP",
    "ComirecDR", "ComirecSA",
)  # fmt: skip
GENERATE = ("HSTU", "HSTU_untied", "HLLM", "RQVAE")
NAMES = (*RANK, *TASKS, *MATCH, *GENERATE)
NEGATIVES = 3
NEEDS = ("torch_rechub",)


def mlp(*dims: int, output: bool | None = None) -> dict:
    made = {"dims": list(dims), "dropout": 0.2, "activation": "relu"}
    return made if output is None else {**made, "output_layer": output}


def make(name: str, rows: int) -> nn.Module:
    from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
    from torch_rechub.models import generative, matching, multi_task, ranking
    from torch_rechub.models.matching import dssm_senet

    fixed = [SparseFeature(f"c{k}", rows, DIM) for k in range(FIELDS)]
    bags = [SequenceFeature("tags", rows, DIM, "mean", padding_idx=0), SequenceFeature("words", rows, DIM, "sum", padding_idx=0)]
    numbers = [DenseFeature(f"d{k}") for k in range(DENSE)]
    every = [*fixed, *bags, *numbers]
    fields = [*fixed, *bags]
    history = [
        SequenceFeature("hist_item", rows, DIM, "concat", shared_with="item", padding_idx=0),
        SequenceFeature("hist_kind", rows, DIM, "concat", shared_with="kind", padding_idx=0),
    ]
    negative = [
        SequenceFeature("neg_item", rows, DIM, "concat", shared_with="item", padding_idx=0),
        SequenceFeature("neg_kind", rows, DIM, "concat", shared_with="kind", padding_idx=0),
    ]
    target = [SparseFeature("item", rows, DIM, padding_idx=0), SparseFeature("kind", rows, DIM, padding_idx=0)]
    one = [SequenceFeature("hist_item", rows, DIM, "concat", shared_with="item")]
    others = [SequenceFeature("neg_items", rows, DIM, "concat", shared_with="item")]
    wide_fields = [SparseFeature(f"c{k}", rows * FIELDS, 4) for k in range(FIELDS)]
    tower = mlp(32, DIM)
    towers = [mlp(16), mlp(16)]
    both = ["classification", "classification"]
    sequence = SequenceFeature("hist_item", rows, DIM)
    sas = [SequenceFeature("seq", rows, DIM, "concat"), *(SequenceFeature(n, rows, DIM, "concat", shared_with="seq") for n in ("pos", "neg"))]
    return {
        "AFM": lambda: ranking.AFM(fields, DIM), "AutoInt": lambda: ranking.AutoInt(fixed, numbers, mlp_params=mlp(32)),
        "BST": lambda: ranking.BST(fixed, history, target, mlp(32), nhead=4),
        "DCN": lambda: ranking.DCN(every, 3, mlp(32, 16)),
        "DCNv2_mix": lambda: ranking.DCNv2(every, 3, mlp(32, 16)),
        "DCNv2": lambda: ranking.DCNv2(every, 3, mlp(32, 16), use_low_rank_mixture=False),
        "DCNv2_stacked": lambda: ranking.DCNv2(every, 3, mlp(32, 16), "stacked", use_low_rank_mixture=False),
        "DeepFFM": lambda: ranking.DeepFFM([SparseFeature(f.name, rows, 1) for f in fixed], wide_fields, 4, mlp(32)),
        "FatDeepFFM": lambda: ranking.FatDeepFFM([SparseFeature(f.name, rows, 1) for f in fixed], wide_fields, 4, 1, mlp(32)),
        "DeepFM": lambda: ranking.DeepFM(every, fields, mlp(32, 16)),
        "DIEN": lambda: ranking.DIEN(fixed, history, negative, target, {"dims": [32], "dropout": 0.2}),
        "DIN": lambda: ranking.DIN(fixed, history, target, {"dims": [32], "dropout": 0.2}, {"dims": [16]}),
        "EDCN": lambda: ranking.EDCN(fixed, 3, {"dims": [32], "dropout": 0.2, "activation": "relu"}),
        "EDCN_attention": lambda: ranking.EDCN(fixed, 3, {"dims": [32], "dropout": 0.2, "activation": "relu"}, "attention_pooling"),
        "FiBiNet": lambda: ranking.FiBiNet(fixed, mlp(32)), "FiBiNet_all": lambda: ranking.FiBiNet(fixed, mlp(32), bilinear_type="field_all"),
        "FiBiNet_each": lambda: ranking.FiBiNet(fixed, mlp(32), bilinear_type="field_each"),
        "WideDeep": lambda: ranking.WideDeep(numbers, fields, mlp(32, 16)),
        "SharedBottom": lambda: multi_task.SharedBottom(every, both, mlp(32), towers),
        "ESMM": lambda: multi_task.ESMM(fixed, target, mlp(16), mlp(16)),
        "MMOE": lambda: multi_task.MMOE(every, both, 4, mlp(32), towers),
        "PLE": lambda: multi_task.PLE(every, both, 2, 2, 1, mlp(32), towers),
        "AITM": lambda: multi_task.AITM(every, 2, mlp(32, 16), towers),
        "DSSM": lambda: matching.DSSM([*fixed, *bags], target, tower, tower),
        "DSSM_senet": lambda: dssm_senet.DSSM([*fixed, *bags], target, tower, tower),
        "FaceBookDSSM": lambda: matching.FaceBookDSSM(
            [*fixed, *bags], [target[0]], [SparseFeature("neg", rows, DIM, shared_with="item")], tower, tower),
        "YoutubeDNN": lambda: matching.YoutubeDNN([*fixed, *bags], [target[0]], others, tower),
        "YoutubeSBC": lambda: matching.YoutubeSBC([*fixed, *bags], target, [DenseFeature("weight")], tower, tower, 9 if rows < 1000 else 2048),
        "MIND": lambda: matching.MIND(fixed, one, [target[0]], others, HISTORY),
        "GRU4Rec": lambda: matching.GRU4Rec(fixed, one, [target[0]], others, tower),
        "NARM": lambda: matching.NARM(sequence, DIM, 0.2, 0.2),
        "SASRec": lambda: matching.SASRec(sas, HISTORY, 0.2),
        "SINE": lambda: matching.SINE(["hist_item"], ["item"], ["neg_items"], rows, DIM, 16, 10, 3, HISTORY),
        "STAMP": lambda: matching.STAMP(sequence, 0.1, 0.1),
        "ComirecDR": lambda: matching.ComirecDR(fixed, one, [target[0]], others, HISTORY),
        "ComirecSA": lambda: matching.ComirecSA(fixed, one, [target[0]], others),
        "HSTU": lambda: generative.HSTUModel(rows, 32, 2, 2, 16, 16, 64),
        "HSTU_untied": lambda: generative.HSTUModel(rows, 32, 2, 2, 16, 16, 64, tie_embeddings=False),
        "HLLM": lambda: generative.HLLMModel(torch.randn(rows, 32), rows, 32, 2, 2, 64),
        "RQVAE": lambda: generative.RQVAEModel(24, [16, 16], 8, [20, 12], sk_epsilons=[0.0, 0.0]),
    }[name]()  # fmt: skip


def inputs(name: str, rows: int, size: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    history = padded(size, HISTORY, rows, seed + 2)
    keep = history != 0
    if name.startswith(("HSTU", "HLLM")):
        return history, torch.randint(0, 3000, (size, HISTORY), generator=g)
    if name == "RQVAE":
        return torch.randn(size, 24, generator=g)
    x = {f"c{k}": ids(size, rows, seed + 10 * k) for k in range(FIELDS)}
    x |= {f"d{k}": dense(size, seed)[:, k] for k in range(DENSE)}
    x |= {"tags": padded(size, BAG, rows, seed), "words": padded(size, BAG, rows, seed + 1)}
    x |= {"item": ids(size, rows, seed + 91), "kind": ids(size, rows, seed + 92), "neg": ids(size, rows, seed + 93)}
    x |= {"hist_item": history, "seq": history, "weight": torch.rand(size, generator=g) + 0.5}
    for n in ("hist_kind", "neg_item", "neg_kind", "pos"):
        x[n] = torch.randint(1, rows, keep.shape, generator=g) * keep
    x["neg_items"] = torch.randint(1, rows, (size, NEGATIVES), generator=g)
    if name == "SASRec":
        x["neg"] = x["neg_item"]
    return used(name, x)


def used(name: str, x: dict) -> dict:
    """Only the entries that some model of that kind reads, as a data loader would give them."""
    general = [k for k in x if k[0] in "cd" and k[1:].isdigit()]
    if name == "SASRec":
        return {k: x[k] for k in ("seq", "pos", "neg")}
    if name in ("NARM", "STAMP"):
        return {"hist_item": x["hist_item"]}
    if name == "SINE":
        return {k: x[k] for k in ("hist_item", "item", "neg_items")}
    if name in ("BST", "DIN", "DIEN"):
        return {k: x[k] for k in (*general, "item", "kind", "hist_item", "hist_kind", "neg_item", "neg_kind")}
    if name in MATCH:
        return {k: x[k] for k in (*general, "tags", "words", "item", "kind", "neg", "neg_items", "weight", "hist_item")}
    return {k: x[k] for k in (*general, "tags", "words", "item", "kind")}


MODELS = zoo(make, NAMES, inputs)

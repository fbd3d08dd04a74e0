"""The peers, set up on shared weights."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from workload import Shape


def fbgemm_bags(shape: Shape, flat: Tensor, state: Tensor, rowwise: bool) -> nn.Module | None:
    """FBGEMM's table-batched embedding bags with (rowwise) AdaGrad fused into the backward, over ``flat`` and ``state``;
    ``None`` where fbgemm_gpu is not installed."""
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return None
    bags = SplitTableBatchedEmbeddingBagsCodegen(
        [(shape.rows, shape.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * shape.tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD if rowwise else EmbOptimType.EXACT_ADAGRAD,
        learning_rate=0.01, eps=1e-10, pooling_mode=PoolingMode.SUM,
    )  # fmt: skip
    assert bags.weights_host.numel() == flat.numel() and bags.momentum1_host.numel() == state.numel()
    bags.weights_host.data = flat
    bags.momentum1_host.data = state
    return bags


def fbgemm_int8_bags(shape: Shape, weights: list[Tensor]) -> nn.Module | None:
    """FBGEMM's table-batched inference bags over 8-bit rows of ``weights``, with float32 results; ``None`` where it is not installed."""
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
    except ImportError:
        return None
    bags = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(f"t{t}", shape.rows, shape.dim, SparseType.INT8, EmbeddingLocation.HOST) for t in range(shape.tables)],
        pooling_mode=PoolingMode.SUM, output_dtype=SparseType.FP32, device="cpu",
    )  # fmt: skip
    bags.fill_random_weights()
    for (kept, beside), table in zip(bags.split_embedding_weights(), weights):  # codes; scale and offset in float16
        least, largest = table.aminmax(dim=1, keepdim=True)
        tail = torch.cat([((largest - least) / 255).clamp_min(6e-8), least], 1).half()
        kept.copy_(((table - tail[:, 1:].float()) / tail[:, :1].float()).round().clamp(0, 255))
        beside.copy_(tail.view(torch.uint8))  # type: ignore[union-attr]
    return bags

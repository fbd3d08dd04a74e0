"""The peers, set up on shared weights."""
from __future__ import annotations

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

"""Models that multiply a sparse matrix (LightGCN, NGCF): its tensor has no storage to compare."""
import pytest
import tablewright as tw
import torch
from torch import nn


@pytest.mark.parametrize("buffer", [False, True])
def test_a_graph_that_also_writes_in_place(buffer):
    class Propagated(nn.Module):
        def __init__(self):
            super().__init__()
            self.user, self.item, self.bias = nn.Embedding(10, 8), nn.Embedding(12, 8), nn.Embedding(12, 1)
            around = (torch.rand(22, 22) > 0.7).float().to_sparse()
            if buffer:
                self.register_buffer("around", around)
            else:
                self.around = around

        def forward(self, user, item):
            rows = torch.sparse.mm(self.around, torch.cat([self.user.weight, self.item.weight]))
            users, items = rows.split([10, 12])
            size = torch.zeros(1).to(user.device)
            for each in (users[user], items[item]):
                size += each.norm()
            return (users[user] * items[item]).sum(1) + self.bias(item).squeeze(1) + size

    torch.manual_seed(0)
    model = Propagated()
    batch = torch.randint(0, 10, (6,)), torch.randint(0, 12, (6,))
    opt = tw.optimize(model, sample_inputs=batch)
    assert opt.report.pieces == 1 and opt.report.coverage["lookups"] == (1, 1)
    for _ in range(2):
        torch.testing.assert_close(opt(*batch), model(*batch))

"""Names of modules that are no identifiers: torch.fx writes them into code between plain quotes."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from torch import nn


@pytest.mark.parametrize("name", ['a"b', "a'b", "back\\slash", "line\nbreak", '"), print("run") #', "</script>", "\u202eabc"])
def test_any_name_of_a_table(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleDict({name: nn.Embedding(10, 4), "b": nn.Embedding(10, 4)})

        def forward(self, ids):
            return torch.cat([table(ids) for table in self.tables.values()], -1)

    model, ids = Model(), torch.randint(0, 10, (3, 2))
    opt = tw.optimize(model, sample_inputs=(ids,))
    assert opt.report.coverage["lookups"] == (2, 2)
    torch.testing.assert_close(opt(ids), model(ids))
    assert opt.state_dict().keys() == model.state_dict().keys()

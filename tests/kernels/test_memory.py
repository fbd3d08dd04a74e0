"""Huge pages: the request moves no value, is made for big CPU tensors only, and is a plan's to refuse."""
import tablewright as tw
import torch
from tablewright.kernels import memory
from torch import nn


def test_huge_pages_change_no_value():
    table = torch.arange(3 << 20, dtype=torch.float32).view(-1, 64)
    small, before, where = torch.ones(8, 8), table.clone(), table.data_ptr()
    asked = memory.use_huge_pages([small, table, table.t(), torch.empty(1 << 30, device="meta")])
    memory.wait()
    assert asked in (0, table.numel() * 4)  # 0 where the system has none
    assert torch.equal(table, before) and table.data_ptr() == where


def test_a_plan_may_refuse_them():
    model = nn.EmbeddingBag(40_000, 64)
    asked = tw.optimize(model, tw.Plan()).report.huge_page_bytes
    assert asked in (0, model.weight.numel() * 4)
    assert tw.optimize(model, tw.Plan(huge_pages=False)).report.huge_page_bytes == 0
    memory.wait()


def test_a_table_freed_meanwhile_is_held_until_done():
    for _ in range(5):
        memory.use_huge_pages([torch.ones(4 << 20)])
    memory.wait()
    assert memory._runner is None and not memory._waiting

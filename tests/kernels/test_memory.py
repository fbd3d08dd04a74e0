"""Huge pages: the request moves no value, is made for big CPU tensors only, and is a plan's to refuse. Freed memory is kept."""
import subprocess
import sys

import pytest
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


_STEPS = """
import ctypes, resource, torch
from tablewright.kernels.memory import keep_freed_memory
def step():
    made = [torch.ones(2_500_000) for _ in range(16)]  # 10 MB each
def megabytes_anew():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // 1_000_000
assert ctypes.CDLL(None).mallopt(-3, 128 << 10)  # what is larger is mapped and given back: how every process begins
given_back = megabytes_anew()
assert keep_freed_memory()
print(given_back, megabytes_anew())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not memory.keep_freed_memory(), reason="the C library is not glibc")
def test_a_step_finds_the_memory_of_the_last_one():
    ran = subprocess.run([sys.executable, "-c", _STEPS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, ran.stdout.split())
    assert 4 * kept < given_back > 600  # of 640 in four steps


def test_a_plan_may_refuse_to_keep_memory():
    model = nn.EmbeddingBag(50, 4)
    report = tw.optimize(model, tw.Plan()).report
    assert report.kept_bytes in (0, memory.KEPT) and ("freed memory" in str(report)) == bool(report.kept_bytes)
    assert tw.optimize(model, tw.Plan(keep_memory=False)).report.kept_bytes == 0
    assert tw.optimize(model.requires_grad_(False), tw.Plan()).report.kept_bytes == 0
    assert tw.Plan.from_dict(tw.Plan(keep_memory=False).to_dict()) == tw.Plan(keep_memory=False)
    with pytest.raises(tw.PlanError, match="keep_memory is 1"):
        tw.Plan(keep_memory=1)

"""Forward of frozen tables in int8 rows (``dtype: int8``) beside float32 rows, plain and ours, and FBGEMM's 8-bit inference bags.

    python benchmarks/int8_rows_cpu.py --threads 1 2

26 tables of 100,000 rows, batch 2048, sums, uniform ids; calls in turn. FBGEMM's CPU wheel runs one thread whatever is asked.
"""
from __future__ import annotations

import argparse

import tablewright as tw
import torch
from embedding_cpu import Memory
from peers import fbgemm_int8_bags
from workload import Bags, Shape, draw_ids, interleaved, median_ms


def calls_of(shape: Shape) -> dict:
    memory = Memory(shape, rowwise=True)
    memory.flat.normal_(0, 0.1)
    offsets = torch.arange(0, shape.batch * shape.pooling, shape.pooling)
    flat = [torch.cat(list(ids)) for ids in draw_ids(shape)]
    lists = [list(ids.view(shape.tables, -1)) for ids in flat]
    plain = Bags(memory.weights, sparse=False).requires_grad_(False)
    int8 = tw.Plan(numerics="approximate", tables={"*": {"dtype": "int8", "trainable": False}})
    models = {"plain": plain, **{f"ours {n}": tw.optimize(plain, p, sample_inputs=(lists[0], offsets)) for n, p in (("fp32", tw.Plan()), ("int8", int8))}}
    calls = {name: (lambda i, m=model: m(lists[i % len(lists)], offsets)) for name, model in models.items()}
    theirs = fbgemm_int8_bags(shape, memory.weights)
    if theirs is not None:
        ends = torch.arange(0, shape.tables * shape.batch * shape.pooling + 1, shape.pooling, dtype=torch.int32)
        small = [ids.int() for ids in flat]
        got, wanted = theirs(small[0], ends), plain(lists[0], offsets)
        torch.testing.assert_close(got.view(wanted.shape), wanted, rtol=0.05, atol=0.01 * shape.pooling)
        calls["FBGEMM int8"] = lambda i: theirs(small[i % len(small)], ends)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--pooling", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for dim in options.dims:
        for pooling in options.pooling:
            calls = calls_of(Shape(26, 100_000, dim, pooling))
            for threads in options.threads:
                torch.set_num_threads(threads)
                with torch.no_grad():
                    ms = {name: median_ms(t) for name, t in interleaved(calls, options.rounds).items()}
                said = ", ".join(f"{name} {value:.2f}" for name, value in ms.items())
                print(f"| dim {dim}, pooling {pooling} | {threads} | {said} |", flush=True)


if __name__ == "__main__":
    main()

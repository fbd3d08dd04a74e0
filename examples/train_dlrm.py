"""Train DLRM twice, as it is and optimized by Tablewright: the same curve, sooner.

    python examples/train_dlrm.py                                   # writes a Criteo-like file and trains on it
    python examples/train_dlrm.py --data train.txt --epochs 1       # Criteo's Kaggle file (.gz works too)
    python examples/train_dlrm.py --rows-per-table 1000000 --dim 64 --steps 20
    python examples/train_dlrm.py --also sparse reordered           # two more yardsticks, see --help

The model is in dlrm.py and knows nothing of Tablewright; `optimize_model` below is the only place that does.
Exit code 1 means that the two trainings did not agree within the tolerance (side_by_side.py says which and why).
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import criteo
import torch
from dlrm import DLRM, MLPERF_BOTTOM, MLPERF_TOP
from side_by_side import Example, Inputs, Learner, compare, repeat
from torch import Tensor

OPTIMIZERS = {  # name -> (class, learning rate unless --lr says otherwise)
    "adagrad": (torch.optim.Adagrad, 0.003),
    "sgd": (torch.optim.SGD, 1.0),
    "adam": (torch.optim.Adam, 0.001),
}


def optimize_model(model: DLRM, make_optimizer, plan: str, inputs: Inputs) -> tuple[Learner, bool]:
    """Returns the optimized learner, and whether it still runs the plain model's algorithm."""
    import tablewright as tw

    chosen = tw.Plan.load(plan) if plan != "auto" else tw.Plan.auto(model, sample_inputs=inputs)
    if not names_an_optimizer(chosen):
        # ---- All that changes in a plain training script: ---------------------------------------------
        optimizer = make_optimizer(model.parameters())
        optimized, optimizer = tw.optimize(model, chosen, optimizer=optimizer, sample_inputs=inputs)
        # -----------------------------------------------------------------------------------------------
        print(f"\n{optimized.report}\n")
        return Learner("optimized", optimized, [optimizer]), True

    # The plan brings an optimizer for tables, so ours is for the weights that it leaves.
    optimized = tw.optimize(model, chosen, sample_inputs=inputs)
    groups = optimized.embedding_optimizer.param_groups
    theirs = {id(weight) for group in groups for weight in group["params"]}
    optimizers = [make_optimizer(weight for weight in optimized.parameters() if id(weight) not in theirs)]
    if not all(group["in_backward"] for group in groups):  # otherwise backward() has updated the tables already
        optimizers.append(optimized.embedding_optimizer)
    print(f"\n{optimized.report}\n")
    return Learner("optimized", optimized, optimizers), False


def names_an_optimizer(plan) -> bool:
    return bool(plan.embedding_optimizer or any(table.embedding_optimizer for table in plan.tables.values()))


class ReorderedDLRM(DLRM):
    """DLRM that takes the rows of a batch in reverse: the same in mathematics, other roundings in float32."""

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        return super().forward(dense.flip(0), ids.flip(0)).flip(0)


def main() -> int:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)

    # The data: what to train on, and the rows after it, held out.
    path = args.data or synthetic_file(args)
    wanted = args.steps * args.batch_size + args.eval_rows if args.epochs is None else None
    rows = criteo.count_rows(path, limit=wanted)
    eval_rows = min(args.eval_rows, rows // 5)
    train_rows = rows - eval_rows
    if eval_rows == 0:
        print(f"{path} has {rows} rows; at least 5 are needed, of which one is held out", file=sys.stderr)
        return 2
    steps_per_epoch = -(-train_rows // args.batch_size)
    steps = args.steps if args.epochs is None else args.epochs * steps_per_epoch
    tables = args.rows_per_table * 26 if len(args.rows_per_table) == 1 else args.rows_per_table

    def read(skip: int, limit: int) -> Iterator[Example]:
        for dense, ids, labels in criteo.read_batches(path, tables, args.batch_size, skip, limit):
            yield (dense.to(args.device), ids.to(args.device)), labels.to(args.device)

    # The model, and the copies of it that are going to be trained.
    torch.manual_seed(args.seed)
    shape = dict(
        rows_per_table=tables,
        dim=args.dim,
        bottom=[max(4, round(size * args.mlp_scale)) for size in MLPERF_BOTTOM],
        top=[max(4, round(size * args.mlp_scale)) for size in MLPERF_TOP],
        mode=args.mode,
    )
    model = DLRM(**shape).to(args.device)
    optimizer_class, lr = OPTIMIZERS[args.optimizer]

    def make_optimizer(parameters) -> torch.optim.Optimizer:
        return optimizer_class(parameters, lr=args.lr or lr)

    table_bytes = sum(table.weight.numel() * table.weight.element_size() for table in model.tables)
    print(f"data       {path}: {train_rows:,} rows to train on, the next {eval_rows:,} held out")
    print(f"model      26 tables x {args.dim}, {table_bytes / 2**20:,.0f} MiB; MLPs {shape['bottom']} and {shape['top']}")
    print(f"training   {steps} steps of {args.batch_size} rows ({steps / steps_per_epoch:.3g} epochs), {args.optimizer}")
    print(f"plain      the model as it is, torch.optim.{optimizer_class.__name__} on dense gradients", flush=True)

    plain = copy.deepcopy(model)
    learners = [Learner("plain", plain, [make_optimizer(plain.parameters())])]
    optimized, same_algorithm = optimize_model(
        copy.deepcopy(model), make_optimizer, args.plan, next(read(0, args.batch_size))[0]
    )
    learners.append(optimized)
    if "sparse" in args.also:
        sparse = copy.deepcopy(model)
        for table in sparse.tables:
            table.sparse = True
        learners.append(Learner("sparse", sparse, [make_optimizer(sparse.parameters())]))
    if "reordered" in args.also:
        reordered = ReorderedDLRM(**shape).to(args.device)
        reordered.load_state_dict(model.state_dict())
        learners.append(Learner("reordered", reordered, [make_optimizer(reordered.parameters())]))
    del model

    held_out = list(read(train_rows, eval_rows))
    return compare(learners, repeat(lambda: read(0, train_rows)), held_out, steps, args.out, same_algorithm)


def synthetic_file(args: argparse.Namespace) -> Path:
    """Writes the Criteo-like file, unless an earlier run with the same arguments did."""
    rows = args.steps * args.batch_size + args.eval_rows if args.epochs is None else 200_000
    path = args.out / f"criteo_like_{rows}_rows_seed_{args.seed}.tsv"
    if not path.exists():
        print(f"No --data: writing {rows:,} rows like Criteo's, with clicks that can be learned, to {path}")
        criteo.write_synthetic(path, rows, args.seed)
    return path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = whole_number(at_least=1)

    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="FILE", help="Criteo TSV, or CSV with header; default: write one")
    data.add_argument("--eval-rows", type=positive, default=20_000, help="held-out rows, at most 1/5 (default: 20000)")
    data.add_argument("--out", type=Path, default=Path("outputs/dlrm"), help="for files written (default: outputs/dlrm)")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--rows-per-table", type=whole_number(at_least=2), nargs="+", default=[100_000], metavar="N",
        help="one number for all tables, or 26 (default: 100000)",
    )  # fmt: skip
    model.add_argument("--dim", type=positive, default=16, help="width of the embeddings (default: 16; MLPerf: 128)")
    model.add_argument("--mlp-scale", type=float, default=0.25, help="times MLPerf's hidden sizes (default: 0.25)")
    model.add_argument(
        "--mode", choices=("sum", "mean", "single"), default="sum",
        help="tables are nn.EmbeddingBag (sum, mean) or nn.Embedding (single) (default: sum)",
    )  # fmt: skip

    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=positive, default=512, help="default: 512")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole_number(at_least=2), default=200, help="default: 200")
    length.add_argument("--epochs", type=positive, help="passes over the whole file, instead of --steps")
    training.add_argument("--optimizer", choices=OPTIMIZERS, default="adagrad", help="default: adagrad")
    training.add_argument("--lr", type=float, help="default: 0.003 for adagrad, 1 for sgd, 0.001 for adam")
    training.add_argument("--seed", type=int, default=0, help="of the data and of the weights (default: 0)")
    training.add_argument("--threads", type=positive, help="default: as torch chooses")
    training.add_argument("--device", default="cpu", help="default: cpu")

    comparison = parser.add_argument_group("comparison")
    comparison.add_argument("--plan", default="auto", metavar="FILE", help="a plan in YAML (default: auto)")
    comparison.add_argument(
        "--also", choices=("sparse", "reordered"), nargs="+", default=[],
        help="more learners. sparse: the plain model with sparse=True in its tables, plain PyTorch's best (not with adam); "
        "reordered: the plain model taking each batch in reverse, to see what rounding alone does",
    )  # fmt: skip
    args = parser.parse_args()
    if len(args.rows_per_table) not in (1, 26):
        parser.error(f"--rows-per-table: {len(args.rows_per_table)} numbers given; expected 1 or 26")
    if "sparse" in args.also and args.optimizer == "adam":
        parser.error("--also sparse: torch.optim.Adam does not take sparse gradients")
    return args


def whole_number(at_least: int):
    def convert(text: str) -> int:
        number = int(text)
        if number < at_least:
            raise argparse.ArgumentTypeError(f"{number} is too small; at least {at_least} is needed")
        return number

    convert.__name__ = "whole number"
    return convert


if __name__ == "__main__":
    try:
        sys.exit(main())
    except criteo.MalformedRow as error:
        sys.exit(str(error))

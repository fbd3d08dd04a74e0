"""The command line: ``python -m tablewright COMMAND ...``."""
from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import TablewrightError, nearest
from .serving import commands as serving

_FACTORY = """\
MODULE is an importable module or a path to a .py file. FACTORY is a function in it that returns what is to be measured, or a
mapping of names to such functions: MODULE:ZOO measures all, MODULE:ZOO.name one. A factory returns

  (model, inputs)             inputs: a tuple of the positional arguments of one batch (or one tensor or mapping)
  (model, [batch1, batch2])   two batches of different size: optimize() sees the first, the comparison runs on both
  tablewright.rewriter.coverage.Case(model, batches, kwargs=...)   where calls take keyword arguments

Exit code: 0 if every model runs in a form that equals the plain one, 1 if one does not, 2 if a target is not usable.
"""


class TargetError(TablewrightError):
    """A MODULE:FACTORY that names nothing, or a factory that does not return a model and its inputs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in serving.NAMES:
        return serving.main(argv)  # in a serving image there is no torch to import
    from .planner import commands as planner
    from .viewer import command as inspect

    parser = argparse.ArgumentParser(prog="python -m tablewright", description="Tablewright's commands.")
    commands = parser.add_subparsers(dest="command", required=True)
    coverage = commands.add_parser(
        "coverage", help="what optimize() makes of models, and whether the result equals them", epilog=_FACTORY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    coverage.add_argument("targets", nargs="+", metavar="MODULE:FACTORY")
    coverage.add_argument("--json", action="store_true", help="one JSON object a line for each model, as it is measured")
    coverage.add_argument("--speed", action="store_true", help="time a training step against plain (dense, and sparse=True)")
    coverage.add_argument("--no-check", dest="check", action="store_false", help="do not compare numbers (with --speed)")
    coverage.add_argument("--seconds", type=float, default=4.0, help="time for each comparison of speeds (default 4)")
    coverage.add_argument("--cpu-clock", action="store_true", help="time by the processor's work, not the wall clock (busy machines, --threads 1)")
    coverage.add_argument("--plan", default="auto", help='"auto" or the path of a plan (.yaml, .json)')
    coverage.add_argument("--threads", type=int, help="threads of PyTorch")
    coverage.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="passed to the factories as a keyword")
    coverage.add_argument("--verbose", action="store_true", help="every reason, and torch's warnings")
    inspect.add(commands, _FACTORY)
    serving.add_commands(commands)
    planner.add_commands(commands, _FACTORY)
    args = parser.parse_args(argv)
    try:
        if hasattr(args, "run"):
            return args.run(args)
        return inspect.run(args) if args.command == inspect.NAME else _coverage(args)
    except TablewrightError as error:
        print(f"tablewright {args.command}: {error}", file=sys.stderr)
        return 2


def _coverage(args: argparse.Namespace) -> int:
    import torch

    from .coverage import Coverage, measure

    if args.threads:
        torch.set_num_threads(args.threads)
    options = dict(option(text) for text in args.option)
    targets = [each for text in args.targets for each in find(text)]
    found, unusable = [], False
    for name, factory in targets:
        try:
            case = case_of(name, factory, options)
            with warnings.catch_warnings():
                if not args.verbose:
                    warnings.simplefilter("ignore")
                row = measure(
                    name, case, plan=args.plan, speed=args.speed, seconds=args.seconds, check=args.check, cpu_clock=args.cpu_clock
                )  # fmt: skip
        except TargetError as error:
            row, unusable = Coverage(name, state="does not run", why=str(error)), True
        found.append(row)
        print(json.dumps(row.to_dict()) if args.json else text_of(row, args.verbose), flush=True)
    if not args.json and len(found) > 1:
        print("\n" + table_of(found))
    return 2 if unusable else 0 if all(row.ok for row in found) else 1


def option(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` with VALUE as JSON, or as it is. Raises :class:`TargetError`."""
    name, found, value = text.partition("=")
    if not found:
        raise TargetError(f"--option {text}: must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# --- MODULE:FACTORY ----------------------------------------------------------------------------------------------------------


def find(target: str) -> list[tuple[str, Callable]]:
    """The named factories that ``MODULE:FACTORY`` means. Raises :class:`TargetError`."""
    module_name, colon, path = target.rpartition(":")
    if not colon or not module_name or not path:
        raise TargetError(f"'{target}' is not MODULE:FACTORY, e.g. my_models:make_dlrm or models/dlrm.py:make_dlrm")
    value: Any = _module(module_name)
    said = module_name
    for part in path.split("."):
        if isinstance(value, Mapping):
            if part not in value:
                raise TargetError(f"{said} has no entry '{part}'{nearest(part, map(str, value))}")
            value = value[part]
        elif not hasattr(value, part):
            raise TargetError(f"{said} has no attribute '{part}'{nearest(part, vars(value))}")
        else:
            value = getattr(value, part)
        said = f"{said}.{part}"
    if isinstance(value, Mapping):
        found = [(f"{target}.{name}", factory) for name, factory in value.items()]
    else:
        found = [(target, value)]
    for name, factory in found:
        if not callable(factory):
            raise TargetError(f"{name} is a {type(factory).__name__}; it must be a function that returns (model, inputs)")
    return found


def _module(name: str) -> Any:
    sys.path[:0] = [] if "" in sys.path or str(Path.cwd()) in sys.path else [str(Path.cwd())]
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        if not Path(name).is_file():
            raise TargetError(f"there is no file {name}")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)
        spec.loader.exec_module(module)
        return module
    except TargetError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise TargetError(f"there is no module '{name}' (looked in the current folder and in sys.path)") from error
        raise TargetError(f"importing {name} failed: {error}") from error
    except Exception as error:
        raise TargetError(f"importing {name} failed: {type(error).__name__}: {error}") from error


def case_of(name: str, factory: Callable, options: Mapping[str, Any]) -> Any:
    """What ``factory(**options)`` returns, as a :class:`~.coverage.Case`. Raises :class:`TargetError`."""
    from torch import Tensor, nn

    from .coverage import Case

    try:
        made = factory(**options)
    except Exception as error:
        raise TargetError(f"{name}() raised {type(error).__name__}: {error}") from error
    if isinstance(made, Case):
        case = made
    elif isinstance(made, tuple) and len(made) == 2:
        model, inputs = made
        case = Case(model, inputs if isinstance(inputs, list) else [inputs])
    else:
        raise TargetError(f"{name}() returned a {type(made).__name__}; it must return (model, inputs), (model, [batch1, batch2]) or a Case")
    if not isinstance(case.model, nn.Module):
        raise TargetError(f"{name}() returned a {type(case.model).__name__} where the model should be: an nn.Module was needed")
    if not case.batches or not all(isinstance(b, (tuple, Tensor, Mapping)) for b in case.batches):
        raise TargetError(f"{name}() returned inputs that are not a tuple of positional arguments, a tensor or a mapping (or a list of such)")
    return case


# --- text --------------------------------------------------------------------------------------------------------------------


def text_of(row: Any, verbose: bool = False) -> str:
    """The lines about one model."""
    lines = [f"{'ok   ' if row.ok else 'WRONG'}  {row.name}"]
    if row.why:
        return "\n".join([*lines, f"    {row.state}: {row.why}"])
    lines.append(f"    {row.state}" + (f" ({row.pieces})" if row.pieces > 1 else "") + f", captured by {row.door}; optimize() took {row.seconds:.1f} s")
    kinds = [f"{k} {a}/{f}" for k, (a, f) in row.kinds.items() if f]
    lines.append("    " + ("; ".join(kinds) or "nothing to rewrite was found") + (f"; {row.launches} fused lookup calls" if row.launches else ""))
    lines.append(f"    largest difference: outputs {row.outputs:.1e}, gradients {row.gradients:.1e}, weights after three steps {row.steps:.1e}")
    lines += [f"    WRONG: {said}" for said in row.wrong]
    lines += [f"    note: {note}" for note in row.notes]
    shown = row.skipped if verbose else row.skipped[:6]
    for kind, status, reason, where, count in shown:
        lines.append(f"    {kind}: {count} {status.lower()}: {reason}" + (f" ({where})" if where else ""))
    if len(shown) < len(row.skipped):
        lines.append(f"    ... {len(row.skipped) - len(shown)} more reasons: --verbose")
    if row.speed:
        lines.append("    training step: " + _speed(row))
    return "\n".join(lines)


def _speed(row: Any) -> str:
    s = row.speed
    said = f"{s['dense_ratio']:.2f}x plain with dense gradients ({s['plain_ms']:.2f} -> {s['ours_ms']:.2f} ms)"
    if "sparse_ratio" in s:
        said += f", {s['sparse_ratio']:.2f}x plain with sparse=True ({s['sparse_ms']:.2f} -> {s['ours_sparse_ms']:.2f} ms)"
    return said


def table_of(rows: Sequence[Any]) -> str:
    """One line for each model, and the totals."""
    cells = [("MODEL", "CAPTURE", "LOOKUPS", "REWRITES", "OUTPUTS", "GRADIENTS", "STEPS", "S", "DENSE", "SPARSE", "")]
    for r in rows:
        applied, found = r.kinds.get("lookups", (0, 0))
        others = [v for k, v in r.kinds.items() if k not in ("lookups", "updates")]
        cells.append((
            r.name, r.door if r.state == "one graph" else r.state, f"{applied}/{found}",
            f"{sum(a for a, _ in others)}/{sum(f for _, f in others)}", f"{r.outputs:.0e}", f"{r.gradients:.0e}", f"{r.steps:.0e}",
            f"{r.seconds:.1f}", f"{r.speed['dense_ratio']:.2f}x" if r.speed else "", f"{r.speed.get('sparse_ratio', 0):.2f}x" if r.speed else "",
            "" if r.ok else "WRONG",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]
    good, one = sum(r.ok for r in rows), sum(r.state == "one graph" for r in rows)
    return "\n".join([*lines, f"{good} of {len(rows)} models equal plain PyTorch; {one} in one graph"])

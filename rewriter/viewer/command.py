"""``python -m tablewright inspect MODULE:FACTORY``: the page of a model from the shell."""
from __future__ import annotations

import argparse
import tempfile
import webbrowser
from pathlib import Path
from typing import Any

NAME = "inspect"


def add(commands: Any, epilog: str) -> None:
    """Adds the command to the parser's ``commands``."""
    parser = commands.add_parser(
        NAME, help="what optimize() makes of a model, as a page that opens in a browser", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("target", metavar="MODULE:FACTORY")
    parser.add_argument("--plan", default="auto", help='"auto" or the path of a plan (.yaml, .json)')
    parser.add_argument("-o", "--output", type=Path, help="where the file goes (default: a temporary file)")
    parser.add_argument("--format", default="html", choices=("html", "json", "model-explorer"))
    parser.add_argument("--profile", action="store_true", help="time every node on the factory's inputs")
    parser.add_argument("--no-sources", dest="sources", action="store_false", help="leave out the lines of the user's files")
    parser.add_argument("--serving", action="store_true", help="also how an export splits the model")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="passed to the factory as a keyword")


def run(args: argparse.Namespace) -> int:
    """Optimizes the model, writes the file and says where it is. Raises :class:`~..cli.TargetError` for a target that names no
    model, and what ``optimize`` raises."""
    from .. import cli
    from ..optimize import optimize
    from . import visualize

    found = cli.find(args.target)
    if len(found) != 1:
        names = ", ".join(name for name, _ in found[:5])
        raise cli.TargetError(f"{args.target} means {len(found)} models ({names}, ...); inspect shows one: name it")
    name, factory = found[0]
    case = cli.case_of(name, factory, dict(map(cli.option, args.option)))
    batch = case.batches[0]
    inputs = batch if isinstance(batch, tuple) else (batch,)
    opt = optimize(case.model, args.plan, sample_inputs=inputs, sample_kwargs=case.kwargs)
    path = args.output
    if path is None:
        ending = ".html" if args.format == "html" else ".json"
        path = Path(tempfile.mkdtemp(prefix="tablewright_")) / f"{type(case.model).__name__}{ending}"
    visualize(opt, path, format=args.format, profile=inputs if args.profile and not case.kwargs else None, sources=args.sources, serving=args.serving)
    print(opt.report)
    print(f"written to {path}")
    if args.open:
        webbrowser.open(path.resolve().as_uri())
    return 0

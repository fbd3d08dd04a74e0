"""Third-party recommenders through ``optimize``: every zoo that is installed, one table.

    python benchmarks/zoo.py --repos ~/repos                      # correctness: small tables, two processes at a time
    python benchmarks/zoo.py --repos ~/repos --speed              # training steps, batch 2048, 100,000 rows a table, one at a time
    python benchmarks/zoo.py --repos ~/repos --zoo torchfm --only FM

A zoo is a file in ``zoo_models/``: only a feature schema and constructor calls; the models come from the packages (pip), or from
clones of their repositories, the folders in ``--repos``. Models are measured by ``python -m tablewright coverage`` in processes of
their own, so that a crash, a hang or a model too big costs one row. ``--rows FILE`` keeps every row (JSON lines): a run that is
given the same file goes on where the last one stopped, and the table is made of all of them.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
BUILDERS = HERE / "zoo_models"
ZOOS = ("torchfm", "deepctr", "rechub", "recbole", "fuxictr", "widedeep", "dlrm", "misc", "repos")
CHUNK = 12  # models in one process


def available(zoo: str) -> list[str]:
    """The names of a zoo's models; none if what they need is not installed (``NEEDS`` names importable modules)."""
    module = importlib.import_module(f"zoo_{zoo}")
    missing = [n for n in getattr(module, "NEEDS", ()) if importlib.util.find_spec(n) is None]
    if missing:
        print(f"{zoo}: left out, because {', '.join(missing)} is not installed", file=sys.stderr)
        return []
    return list(module.MODELS)


# --- processes ---------------------------------------------------------------------------------------------------------------


def run(zoo: str, names: list[str], args: argparse.Namespace) -> Iterator[dict]:
    """The rows of ``names``, each as soon as it is known. A process that ends or hangs costs the model it was at."""
    left = list(names)
    while left:
        done = 0
        for row in _process(zoo, left, args):
            done += 1
            yield row
        left = left[done:]


def _process(zoo: str, names: list[str], args: argparse.Namespace) -> Iterator[dict]:
    size = {"rows": 100_000, "sizes": [2048, 2048]} if args.speed else {"rows": 50, "sizes": [6, 9]}
    command = [sys.executable, "-m", "tablewright", "coverage", "--json", "--threads", str(args.threads)]
    command += [f"--option={k}={json.dumps(v)}" for k, v in size.items()]
    command += ["--speed", f"--seconds={args.seconds}", "--no-check"] if args.speed else []
    command += ["--cpu-clock"] if args.speed and args.threads == 1 else []
    command += ["--plan", str(args.plan)] if args.plan else []
    command += [f"zoo_{zoo}:MODELS.{name}" for name in names]
    path = os.pathsep.join([str(BUILDERS), *map(str, repositories(args.repos)), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(args.threads), "PYTHONWARNINGS": "ignore"}
    limit = int(args.memory * 2**30)
    with tempfile.TemporaryFile() as errors, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    ) as process:  # fmt: skip
        yield from _rows(process, zoo, names, args.timeout, errors)


def _rows(process: subprocess.Popen, zoo: str, names: list[str], timeout: float, errors: IO[bytes]) -> Iterator[dict]:
    assert process.stdout is not None
    done, text, why = 0, b"", ""
    with selectors.DefaultSelector() as wait:
        wait.register(process.stdout, selectors.EVENT_READ)
        while done < len(names):
            if not wait.select(timeout):
                why = f"no result within {timeout:.0f} s"
                break
            read = os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                break
            *lines, text = (text + read).split(b"\n")
            for line in lines:
                if line.startswith(b"{"):
                    done += 1
                    yield {**json.loads(line), "zoo": zoo}
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    code = process.wait()
    if done < len(names):
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().rpartition("\n")[2][-300:]
        why = why or f"the process ended with {'signal ' + str(-code) if code < 0 else 'exit code ' + str(code)}: {last}"
        yield {"name": f"zoo_{zoo}:MODELS.{names[done]}", "zoo": zoo, "state": "failed", "why": why, "ok": False}


def forced_plan(path: Path) -> Path:
    """Writes a plan under which what is measured elsewhere is rewritten without measuring."""
    from tablewright.passes import DEFAULT

    measured = [p for p in DEFAULT if any(f.name == "measure" for f in dataclasses.fields(p))]
    path.write_text(json.dumps({"version": 1, "passes": {p.name: {"measure": False} for p in measured}}))
    return path


def repositories(folder: Path | None) -> list[Path]:
    """The clones in ``--repos``."""
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder else []


# --- all of it ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", action="append", choices=ZOOS, help="only these zoos")
    parser.add_argument("--only", action="append", help="only these models")
    parser.add_argument("--quick", action="store_true", help="every fifth model")
    parser.add_argument("--speed", action="store_true", help="time training steps instead of comparing numbers")
    parser.add_argument("--force", action="store_true", help="make every rewrite, also where it is measured slower (correctness only)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the training steps of one model (default 2)")
    parser.add_argument("--budget", type=float, help="stop after so many seconds (go on later with the same --rows)")
    parser.add_argument("--repos", type=Path, help="folder of cloned repositories")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model (default 300)")
    parser.add_argument("--memory", type=float, default=14, help="GiB for one process (default 14)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch: by default 1, and 2 with --speed; --speed with 1 is timed "
                        "by the processor's work, which other programs disturb little")
    parser.add_argument("--rows", type=Path, help="keep the rows here, and take from here those that are there")
    parser.add_argument("--table-only", action="store_true", help="measure nothing: make the table of --rows")
    parser.add_argument("--note", default="", help="a sentence for the page's head: how busy the machine was, say")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"zoo_{datetime.date.today()}.md")
    args = parser.parse_args()
    args.plan = forced_plan(Path(tempfile.mkdtemp()) / "plan.json") if args.force else None
    args.threads = args.threads or (2 if args.speed else 1)
    sys.path[:0] = [str(BUILDERS), *map(str, repositories(args.repos))]
    from zoo_table import page

    kept = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows and args.rows.exists() else []
    kind = "speed" if args.speed else "forced" if args.force else "check"
    have = {r["name"] for r in kept if r["kind"] == kind}
    jobs = []
    for zoo in () if args.table_only else args.zoo or ZOOS:
        names = [n for n in available(zoo) if not args.only or n in args.only][:: 5 if args.quick else 1]
        names = [n for n in names if f"zoo_{zoo}:MODELS.{n}" not in have]
        jobs += [(zoo, names[i : i + CHUNK]) for i in range(0, len(names), CHUNK)]
    ends = time.time() + args.budget if args.budget else float("inf")

    def work(job: tuple[str, list[str]]) -> None:
        for row in run(*job, args) if time.time() < ends else ():
            row = {**row, "kind": kind}
            kept.append(row)
            print(f"{row['name']}: {'ok' if row['ok'] else 'WRONG'} {row['state']} {row.get('speed') or ''} {row.get('why', '')[:200]}", flush=True)
            if args.rows:
                with args.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if time.time() > ends:
                break

    with concurrent.futures.ThreadPoolExecutor(1 if args.speed else 2) as pool:
        for future in [pool.submit(work, job) for job in jobs]:
            future.result()
    text = page(kept, args.note)
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

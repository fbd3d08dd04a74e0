"""The page that ``zoo.py`` writes: totals, one row a model, and every failure and reason, grouped."""
from __future__ import annotations

import math
import platform
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SLOW = 0.95
# How many of 255 models of the same zoos had such a thing when they were counted by hand-written patterns (240 captured ones).
CENSUS = {
    "lookups": "241", "pooled": "137", "interactions": "22 FM, 17 Gram matrices, 16 pair products, 5 CIN", "cross": "18",
    "mlps": "161 with a linear layer and ReLU",
}  # fmt: skip


def page(rows: list[dict], note: str = "") -> str:
    """Markdown of ``rows`` (the latest row of each model and kind of run counts)."""
    checks = {r["name"]: r for r in rows if r["kind"] == "check"}
    speeds = {r["name"]: r for r in rows if r["kind"] == "speed"}
    forced = {r["name"]: r for r in rows if r["kind"] == "forced"}
    parts = [f"{_heading()} {note}".strip(), _totals(checks, speeds), _kinds(checks), _failures(checks, speeds), _forced(forced), _reasons(checks), _models(checks, speeds)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _heading() -> str:
    import torch

    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.processor())
    return (
        f"# Third-party models through `optimize`\n\ncommit {commit}, torch {torch.__version__}, {cpu}, {torch.get_num_threads()} cores. "
        "Correctness: 50 rows a table, one sample batch of 6; compared at 6 and 9 rows in train and eval mode, dropout 0, fp32. "
        "Speed: 100,000 rows a table, batch 2048, median training step with AdaGrad, plain and optimized in turn."
    )


def _mean(values: list[float]) -> str:
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}" if values else ""


def _percent(part: int, whole: int) -> str:
    return f"{part}/{whole} ({100 * part / whole:.1f} %)" if whole else ""


def _short(row: dict) -> str:
    return row["name"].partition("MODELS.")[2]


def _totals(checks: dict, speeds: dict) -> str:
    lines = ["| zoo | models | one graph | equal plain | lookups in fused ops | step vs dense | step vs sparse | slower than 0.95x |", "|---|---|---|---|---|---|---|---|"]
    every = [*checks.values(), *speeds.values()]
    for zoo in [*dict.fromkeys(r["zoo"] for r in every), None]:
        mine = [r for r in checks.values() if zoo in (None, r["zoo"]) and r["state"] != "does not run"]
        timed = [r["speed"] for r in speeds.values() if zoo in (None, r["zoo"]) and r.get("speed")]
        applied, found = (sum(r.get("kinds", {}).get("lookups", (0, 0))[i] for r in mine if i or r["ok"]) for i in (0, 1))
        slow = sum(min(s["dense_ratio"], s.get("sparse_ratio", 9)) < SLOW for s in timed)
        lines.append(
            f"| {zoo or '**all**'} | {len(mine)} | {_percent(sum(r['state'] == 'one graph' for r in mine), len(mine))} | "
            f"{_percent(sum(r['ok'] for r in mine), len(mine))} | {_percent(applied, found)} | {_mean([s['dense_ratio'] for s in timed])} | "
            f"{_mean([s['sparse_ratio'] for s in timed if 'sparse_ratio' in s])} | {slow if timed else ''} |"
        )
    return "\n".join(lines)


def _kinds(checks: dict) -> str:
    """For each kind of rewrite: models and places where it was found, applied, skipped."""
    models, counts = Counter(), defaultdict(Counter)
    for row in checks.values():
        for kind, (applied, found) in row.get("kinds", {}).items():
            models[kind] += found > 0
            counts[kind].update(applied=applied, found=found)
    if not counts:
        return ""
    lines = ["## Found and applied", "", "| kind | models with it in an earlier census of 255 | models here | found | applied | left, with a reason |", "|---|---|---|---|---|---|"]
    lines += [f"| {k} | {CENSUS.get(k, '')} | {models[k]} | {c['found']} | {c['applied']} | {c['found'] - c['applied']} |" for k, c in counts.items() if c["found"]]
    return "\n".join(lines)


def cause(text: str) -> str:
    """A reason without the names and numbers that are one model's own."""
    text = re.sub(r"/\S*/([\w.]+\.py):\d+", r"\1", text)
    text = re.sub(r"/\S*/", "", text)
    text = re.sub(r"'[^']*'", "'..'", text)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", text)[:240]


def _failures(checks: dict, speeds: dict) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for row in checks.values():
        if row["state"] == "does not run":
            groups[f"the plain model does not run here: {cause(row['why'])}"].append(row["name"])
        elif row.get("wrong"):
            groups[f"WRONG NUMBERS: {cause(row['wrong'][0])}"].append(row["name"])
        elif not row["ok"]:
            groups[f"{row['state']}: {cause(row['why'])}"].append(row["name"])
        elif row["state"] != "one graph":
            said = next((n for n in row.get("notes", ()) if "captured" in n or "piece" in n), "")
            groups[f"equal, but {row['state']}: {cause(said)}"].append(row["name"])
    for row in speeds.values():
        s = row.get("speed") or {}
        if not s:
            groups[f"not timed: {cause(row.get('why', '') or str(row.get('wrong')))}"].append(row["name"])
        for side in ("dense", "sparse"):
            if s.get(f"{side}_ratio", 9) < SLOW:
                groups[f"slower than {SLOW}x of plain with {side} gradients"].append(f"{row['name']} ({s[f'{side}_ratio']:.2f}x)")
    lines = ["## What is not as it should be", ""]
    for why, names in sorted(groups.items(), key=lambda each: ("WRONG" not in each[0], -len(each[1]))):
        lines.append(f"- {len(names)} x {why}: {', '.join(n.replace('zoo_', '').replace('MODELS.', '') for n in names)}")
    return "\n".join(lines) if groups else "## What is not as it should be\n\nNothing."


def _forced(forced: dict) -> str:
    """The same comparison with every rewrite made, also those that ``auto`` measures slower."""
    if not forced:
        return ""
    ran = [r for r in forced.values() if r["state"] != "does not run"]
    applied = Counter()
    for row in ran:
        applied.update({k: a for k, (a, _) in row.get("kinds", {}).items() if a})
    wrong = [f"- {_short(r)} ({r['zoo']}): {(r.get('wrong') or [r.get('why', '')])[0][:200]}" for r in ran if not r["ok"]]
    done = ", ".join(f"{n} {k}" for k, n in applied.most_common())
    return "\n".join([f"## Every rewrite made, measured slower or not\n\n{_percent(len(ran) - len(wrong), len(ran))} equal plain; rewritten: {done}.", "", *wrong])


def _reasons(checks: dict) -> str:
    counts, where, example = Counter(), defaultdict(set), {}
    for row in checks.values():
        for kind, status, reason, location, count in row.get("skipped", ()):
            key = f"{kind} {status.lower()}: {cause(reason)}"
            counts[key] += count
            where[key].add(row["name"])
            example.setdefault(key, f"{row['name'].replace('zoo_', '').replace('MODELS.', '')} {location}".strip())
    lines = ["## Why things were left as they are", "", "| times | models | reason | for example |", "|---|---|---|---|"]
    lines += [f"| {n} | {len(where[k])} | {k.replace('|', '/')} | {example[k]} |" for k, n in counts.most_common()]
    return "\n".join(lines) if counts else ""


def _models(checks: dict, speeds: dict) -> str:
    lines = ["## Models", "", "| model | captured by | s | lookups | other rewrites | outputs | gradients | 3 steps | vs dense | vs sparse |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name in dict.fromkeys([*checks, *speeds]):
        r, s = checks.get(name, {}), (speeds.get(name) or {}).get("speed") or {}
        kinds = r.get("kinds", {})
        lookups = "{}/{}".format(*kinds["lookups"]) if "lookups" in kinds else ""
        others = ", ".join(f"{k} {a}/{f}" for k, (a, f) in kinds.items() if f and k not in ("lookups", "updates", "dropouts"))
        door = r.get("door", "") if r.get("state") == "one graph" else r.get("state", "")
        ratios = [f"{s[k]:.2f}" if k in s else "" for k in ("dense_ratio", "sparse_ratio")]
        numbers = [f"{r[k]:.0e}" if isinstance(r.get(k), float) and r[k] == r[k] else "" for k in ("outputs", "gradients", "steps")]
        bad = "" if r.get("ok", True) else " **WRONG**" if r.get("wrong") else ""
        seconds = f"{r['seconds']:.1f}" if r.get("seconds") else ""
        lines.append(f"| {(r or speeds[name])['zoo']} {_short(r or speeds[name])}{bad} | {door} | {seconds} | {lookups} | {others} | {' | '.join(numbers)} | {' | '.join(ratios)} |")
    return "\n".join(lines)

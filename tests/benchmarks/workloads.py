"""The README's table of reference workloads: each recipe run with several seeds, then one Markdown table.

    python tests/benchmarks/workloads.py [--seeds 3] [--as-shipped] [RECIPE ...]

The recipes as they are shipped train for minutes, which leaves baselines that go on learning whatever is done to
them. Here they are trained for longer, so that what is lost is lost: minutes a run on a GPU.
Accuracy is the mean over the seeds with its 95 % interval (Student's t); everything else is of the first seed's
session. Finished runs are kept, so that an interrupted command goes on: ``--folder`` says where.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from jetway.tasks.store import jetway_home
from jetway.tasks.table import human_bytes, human_count

RECIPES = ("mobilenet_v3", "detector", "segmenter", "bev_fusion")
ACCURACY = {
    "mobilenet_v3": ("top1",),
    "detector": ("map50_95", "map50"),
    "segmenter": ("miou",),
    "bev_fusion": ("map", "miou"),
}
#: About four times as long as shipped.
LONGER = {
    "mobilenet_v3": ("train.epochs=20", "finetune.epochs=24", "qat.epochs=2", "qat.learning_rate=1e-4"),
    "detector": ("train.epochs=16", "finetune.epochs=20", "qat.epochs=3"),
    "segmenter": ("train.epochs=16", "finetune.epochs=18", "qat.epochs=2", "qat.learning_rate=1e-4"),
    "bev_fusion": ("train.epochs=12", "finetune.epochs=20"),
}
#: Exit codes of runs whose figures count: a missed or undecided gate is shown in its column.
MEASURED = (0, 1, 5)

Run = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=jetway_home() / "benchmarks")
    parser.add_argument("--as-shipped", action="store_true", help="trained for minutes, as the recipes say")
    arguments = parser.parse_args()
    for recipe in arguments.recipes:
        overrides = () if arguments.as_shipped else LONGER[recipe]
        runs = [run(recipe, seed, overrides, arguments.folder) for seed in range(arguments.seeds)]
        print("\n".join([f"**{recipe}**, {where(runs[0])}", "", *table(recipe, runs), ""]), flush=True)
    return 0


def run(recipe: str, seed: int, overrides: Sequence[str], folder: Path) -> Run:
    """The object that ``jetway run --json`` prints, from its file if it ran before."""
    path = folder / f"{recipe}-{'longer' if overrides else 'as-shipped'}-{seed}.json"
    if not path.exists():
        settings = [word for value in (f"seed={seed}", *overrides) for word in ("--set", value)]
        command = [sys.executable, "-m", "jetway.flows", "run", recipe, *settings, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode not in MEASURED:
            sys.exit(f"jetway run {recipe} with seed {seed} ended with exit code {done.returncode}")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout)
    document: Run = json.loads(path.read_text())
    return document


def where(document: Run) -> str:
    row = document["variants"][0]
    stages_s = sum(stage["seconds"] for stage in document["stages"])
    return f"{row['engine']} on {row['board']}; stages of the first run {stages_s:.0f} s"


def table(recipe: str, runs: list[Run]) -> list[str]:
    metrics = ACCURACY[recipe]
    titles = [
        "variant",
        "MACs",
        "size",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        *metrics,
        f"{metrics[0]} lost",
        "valid",
    ]
    lines = [titles, [":--", *["--:"] * (len(titles) - 1)]]
    lines += [line(row["variant"], metrics, runs) for row in runs[0]["variants"]]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def line(variant: str, metrics: tuple[str, ...], runs: list[Run]) -> list[str]:
    rows = [row for document in runs for row in document["variants"] if row["variant"] == variant]
    first = rows[0]["metrics"]
    return [
        variant,
        human_count(first["macs"]) + ratio(rows[0], "macs_ratio"),
        human_bytes(first["size_bytes"]) + ratio(rows[0], "size_ratio"),
        f"{first['latency_ms_p50']:.3g}" + ratio(rows[0], "latency_p50_ratio"),
        f"{first['latency_ms_p90']:.3g}",
        f"{first['latency_ms_p99']:.3g}" if first.get("latency_ms_p99") else "-",
        *(over_seeds([row["metrics"][metric] for row in rows]) for metric in metrics),
        over_seeds([row["metrics"].get(f"{metrics[0]}_drop") or 0.0 for row in rows]),
        f"{sum(row['validity']['valid'] for row in rows)}/{len(rows)}",
    ]


def ratio(row: dict[str, Any], name: str) -> str:
    value, interval = row["metrics"].get(name), row["intervals"].get(name)
    if row["variant"] == "baseline-fp32" or value is None:
        return ""
    bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f" (x{value:.3f}{bounds})"


def over_seeds(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    margin = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {margin:.4f}"


if __name__ == "__main__":
    sys.exit(main())

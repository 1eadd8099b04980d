"""The README's table of reference workloads: each recipe run with several seeds, then one Markdown table.

    python tests/benchmarks/workloads.py [--seeds 3] [--as-shipped] [--side-by-side 1] [RECIPE ...]

The recipes as they are shipped train for minutes, which leaves baselines that go on learning whatever is done to
them. Here they are trained for longer, so that what is lost is lost: minutes a run on a GPU.
Accuracy is the mean over the seeds with its 95 % interval (Student's t); everything else is of the first seed's
session. Finished runs are kept, so that an interrupted command goes on: ``--folder`` says where. Runs side by side
share a GPU in training; what they measure meanwhile is no speed, so that the first seeds are measured again alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto
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
    # 0.35, as shipped, costs 0.8 points more of map50_95 then
    "detector": (
        "train.epochs=16",
        "prune.target_macs_ratio=0.45",
        "finetune.epochs=20",
        "qat.epochs=6",
        "qat.learning_rate=2e-3",
        "qat.schedule=one_cycle",
    ),
    "segmenter": ("train.epochs=16", "finetune.epochs=24", "qat.epochs=2", "qat.learning_rate=1e-4"),
    # 0.4, as shipped, costs 1.3 points of map then
    "bev_fusion": ("train.epochs=12", "finetune.epochs=20", "prune.pruning_ratio=0.25"),
}
#: The variant whose layers in float are told.
MIXED = "pruned-int8-qat"
#: Exit codes of runs whose figures count: a missed or undecided gate is shown in its column.
MEASURED = (0, 1, 5)
#: Runs side by side wait for the target in turns.
BUSY_TIMEOUT_S = 3600

Run = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=jetway_home() / "benchmarks")
    parser.add_argument("--as-shipped", action="store_true", help="trained for minutes, as the recipes say")
    parser.add_argument("--side-by-side", type=int, default=1, metavar="N", help="runs at a time")
    arguments = parser.parse_args()
    length = "as-shipped" if arguments.as_shipped else "longer"
    seeds = range(arguments.seeds)
    with ThreadPool(arguments.side_by_side) as pool:
        pool.starmap(
            run, [(recipe, seed, length, arguments.folder) for recipe in arguments.recipes for seed in seeds]
        )
    for recipe in arguments.recipes:
        if arguments.side_by_side > 1:
            run(recipe, 0, length, arguments.folder, again="-alone")
        print(f"**{recipe}**, {report(recipe, seeds, length, arguments.folder)}\n", flush=True)
    return 0


def run(recipe: str, seed: int, length: str, folder: Path, again: str = "") -> None:
    """Keeps what ``jetway run --json`` prints, if it did not run before. Each has a home of its own."""
    path = folder / f"{recipe}-{length}-{seed}{again}.json"
    if path.exists():
        return
    home = home_of(recipe, seed, length, folder)
    home.mkdir(parents=True, exist_ok=True)
    overrides = (f"seed={seed}", *(LONGER[recipe] if length == "longer" else ()))
    settings = [word for value in overrides for word in ("--set", value)]
    done = jetway(home, "run", recipe, *settings, "--busy-timeout-s", str(BUSY_TIMEOUT_S), "--json")
    jetway(home, "stop")
    if done.returncode not in MEASURED or json.loads(done.stdout)["status"] != "FINISHED":
        raise RuntimeError(f"jetway run {recipe} with seed {seed} ended with exit code {done.returncode}")
    path.write_text(done.stdout)


def home_of(recipe: str, seed: int, length: str, folder: Path) -> Path:
    return folder / "homes" / f"{recipe}-{length}-{seed}"


def jetway(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jetway.flows", *arguments]
    environment = os.environ | {"JETWAY_HOME": str(home)}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)


def report(recipe: str, seeds: Sequence[int], length: str, folder: Path) -> str:
    """Where it ran, the table, and what stays in float; speed is of the first seed measured alone, if it was."""
    runs = [read(folder / f"{recipe}-{length}-{seed}.json") for seed in seeds]
    title = where(runs[0])
    alone = folder / f"{recipe}-{length}-0-alone.json"
    runs[0] = read(alone) if alone.exists() else runs[0]
    artifacts = home_of(recipe, seeds[0], length, folder) / "mlartifacts" / runs[0]["run_id"] / "artifacts"
    return "\n".join([title, "", *table(recipe, runs), "", *in_float(artifacts)])


def in_float(artifacts: Path) -> list[str]:
    """The share of weights in integers, and how many layers are not, by reason; figures in reasons are left out."""
    path = f"{MIXED}/lower.onnx"
    model = json.loads((artifacts / "files.json").read_text())[path]
    islands = Counter(
        re.sub(r"[\d.]+ us", "… us", island["reason"]) for island in model["metadata"]["float_islands"]
    )
    title = f"{MIXED}: {int8_weights_ratio(artifacts / path):.1%} of the weights in INT8; layers in float:"
    return [title, *(f"- {count}: {reason}" for reason, count in islands.most_common())]


def int8_weights_ratio(path: Path) -> float:
    """Elements of integer weights among those of all weights; vectors such as biases and scales are none."""
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) > 1]
    integer = [tensor for tensor in weights if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8)]
    return elements(integer) / elements(weights)


def elements(tensors: Sequence[TensorProto]) -> int:
    return sum(math.prod(map(int, tensor.dims)) for tensor in tensors)


def read(path: Path) -> Run:
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
        over_seeds([row["metrics"].get(f"{metrics[0]}_drop") or 0.0 for row in rows])
        + bounds(rows[0], f"{metrics[0]}_drop"),
        f"{sum(row['validity']['valid'] for row in rows)}/{len(rows)}",
    ]


def ratio(row: dict[str, Any], name: str) -> str:
    value = row["metrics"].get(name)
    if row["variant"] == "baseline-fp32" or value is None:
        return ""
    return f" (x{value:.3f}{bounds(row, name)})"


def bounds(row: dict[str, Any], name: str) -> str:
    """The paired interval of one session, as a ratio's; empty where nothing is compared."""
    interval = row["intervals"].get(name)
    return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""


def over_seeds(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    margin = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {margin:.4f}"


if __name__ == "__main__":
    sys.exit(main())

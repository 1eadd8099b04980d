"""Automatic pruning ratios against one ratio for all, at the same MACs, from the same baselines.

    .venv/bin/python tests/benchmarks/pruning_ratios.py digits --seeds 3 [--set train.epochs=4 ...]

Every seed trains a baseline, prunes it both ways, fine-tunes both alike and scores them on the evaluation data.
"""

import argparse
import statistics
import tempfile
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from jetway.configs.load import load_recipe
from jetway.configs.schema import SensitivityConfig
from jetway.tasks.finetune import finetune_network
from jetway.tasks.load import load_baseline
from jetway.tasks.prune import prune_network
from jetway.tasks.sensitivity import measure_pruning
from jetway.tasks.stage import StageContext, seed_everything
from jetway.tasks.store import Store
from jetway.tasks.workload import load_workload

#: Two-sided 95 % quantiles of Student's t, by the number of seeds.
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--processes", type=int, default=1, help="seeds at a time, each in a process")
    arguments = parser.parse_args()
    recipe, path = load_recipe(arguments.recipe, arguments.overrides)
    print(
        "| seed | baseline | ratios | MACs | pruned | fine-tuned |\n| --: | --: | :-- | --: | --: | --: |",
        flush=True,
    )
    with get_context("spawn").Pool(arguments.processes) as pool:
        gains = pool.map(partial(compare, recipe, path), range(arguments.seeds), chunksize=1)
    mean = statistics.mean(gains)
    spread = (
        T_95.get(len(gains), 2.0) * statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    )
    print(f"\nauto less uniform, fine-tuned: {mean:+.4f} ± {spread:.4f} (95 %, {len(gains)} seeds)")


def compare(recipe, path, seed):
    with tempfile.TemporaryDirectory() as folder:
        return compare_in(Path(folder), recipe, path, seed)


def compare_in(folder, recipe, path, seed):
    """Gain of automatic ratios in the primary metric after fine-tuning; prints a row for each way."""
    workload = load_workload(recipe.workload, search_path=[Path.cwd(), path.parent])
    context = StageContext(workload, Store(folder / "store"), seed=seed, threads=1, work_dir=folder / "work")
    seed_everything(seed)
    baseline = load_baseline(context, None, recipe.train)
    name = workload.primary_metric.name
    found = {}
    for ratios in ("uniform", "auto"):
        config = recipe.prune.model_copy(update={"pruning_ratio": "auto" if ratios == "auto" else 0.5})
        section = recipe.sensitivity or SensitivityConfig()
        curves = (
            measure_pruning(context, baseline.handle, config, section).handle if ratios == "auto" else None
        )
        seed_everything(seed)
        pruned = prune_network(context, baseline.handle, config, recipe.finetune, curves)
        seed_everything(seed)
        tuned = finetune_network(context, pruned.handle, recipe.finetune, baseline.handle)
        found[ratios] = tuned.metrics[name]
        row = (seed, f"{baseline.metrics[name]:.4f}", ratios, f"{pruned.metrics['macs_ratio']:.3f}")
        print(
            "|",
            " | ".join(map(str, row)),
            f"| {pruned.metrics[name]:.4f} | {tuned.metrics[name]:.4f} |",
            flush=True,
        )
    sign = 1 if workload.primary_metric.higher_is_better else -1
    return sign * (found["auto"] - found["uniform"])


if __name__ == "__main__":
    main()

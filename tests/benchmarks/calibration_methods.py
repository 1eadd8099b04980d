"""What PTQ costs by each calibration method, and how much of it QAT wins back, as PyTorch scores it.

    .venv/bin/python tests/benchmarks/calibration_methods.py detector --methods percentile max [--set KEY=VALUE ...]

Every seed trains a baseline; each method quantizes it, and trains on from there as the recipe's ``qat`` says. No time
is measured, so that seeds may share a machine or a GPU.
"""

import argparse
import tempfile
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from jetway.configs.load import load_recipe
from jetway.configs.schema import CalibrationMethod
from jetway.tasks.load import load_baseline
from jetway.tasks.qat import quantize_ptq, train_qat
from jetway.tasks.stage import StageContext, seed_everything
from jetway.tasks.store import Store
from jetway.tasks.workload import load_workload


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--methods", nargs="+", default=["percentile", "entropy", "mse", "max"], choices=[*CalibrationMethod]
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--processes", type=int, default=1, help="seeds at a time, each in a process")
    arguments = parser.parse_args()
    recipe, path = load_recipe(arguments.recipe, arguments.overrides)
    print(
        "| seed | method | metric | baseline | PTQ | QAT |\n| --: | :-- | :-- | --: | --: | --: |", flush=True
    )
    with get_context("spawn").Pool(arguments.processes) as pool:
        pool.map(partial(quantize, recipe, path, arguments.methods), range(arguments.seeds), chunksize=1)


def quantize(recipe, path, methods, seed):
    """Prints a row for each method."""
    workload = load_workload(recipe.workload, search_path=[Path.cwd(), path.parent])
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext(
            workload, Store(Path(folder) / "store"), seed=seed, threads=1, work_dir=Path(folder) / "work"
        )
        seed_everything(seed)
        baseline = load_baseline(context, None, recipe.train)
        for method in methods:
            config = recipe.qat.model_copy(update={"calibration": CalibrationMethod(method)})
            ptq = quantize_ptq(context, baseline.handle, config)
            seed_everything(seed)
            qat = train_qat(context, ptq.handle, config, baseline.handle) if config.epochs else ptq
            for metric in workload.metrics:
                scores = [f"{stage.metrics[metric.name]:.4f}" for stage in (baseline, ptq, qat)]
                print(f"| {seed} | {method} | {metric.name} | {' | '.join(scores)} |", flush=True)


if __name__ == "__main__":
    main()

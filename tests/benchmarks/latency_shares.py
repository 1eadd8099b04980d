"""What pruning does to each part of a network: predicted from the analysis, and measured.

    .venv/bin/python tests/benchmarks/latency_shares.py bev_fusion [--set prune.depth.keep=... ...]

A part is a direct child of the network. Its predicted latency is what it took in the baseline's analysis on this
host, module by module, times the share of each module's MACs that pruning leaves. Measured is the analysis of the
pruned network, and ONNX Runtime's own profile of both exported networks, in alternating rounds. Weights do not
change a latency, so nothing is trained here.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path

import onnxruntime

from jetway.configs.load import load_recipe
from jetway.configs.schema import AnalyzeConfig, Precision
from jetway.tasks.analyze import analyze_network
from jetway.tasks.checkpoint import save_checkpoint
from jetway.tasks.export import export_onnx
from jetway.tasks.prune import prune_network
from jetway.tasks.stage import StageContext, seed_everything
from jetway.tasks.store import Store
from jetway.tasks.workload import load_workload

ROUNDS, RUNS = 10, 10
OTHER = "(forward)"
TITLES = ("part", "host ms", "predicted ms", "measured ms", "predicted share", "measured share")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    recipe, path = load_recipe(arguments.recipe, arguments.overrides)
    workload = load_workload(recipe.workload, search_path=[Path.cwd(), path.parent])
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext(
            workload, Store(Path(folder) / "store"), threads=1, work_dir=Path(folder) / "work"
        )
        print_table(*measure(context, recipe))


def measure(context, recipe):
    """Milliseconds by part: the baseline's and the pruned network's analysis, the prediction, and both profiles."""
    seed_everything(recipe.seed)
    baseline = save_checkpoint(context.store, context.workload.network(), structure=None)
    pruned = prune_network(context, baseline, recipe.prune, None).handle
    before, after = (modules(context, checkpoint) for checkpoint in (baseline, pruned))
    predicted = {name: row["latency_ms"] * kept(row, after.get(name)) for name, row in before.items()}
    profiles = profile(context, recipe, [baseline, pruned])
    return (by_part(latencies(before)), by_part(predicted), by_part(latencies(after)), *profiles)


def modules(context, checkpoint):
    report = analyze_network(context, checkpoint, AnalyzeConfig(latency_runs=ROUNDS * RUNS))
    return {row["module"]: row for row in context.store.load_json(report.handle)["modules"]}


def latencies(rows):
    return {name: row["latency_ms"] for name, row in rows.items()}


def kept(before, after):
    """Share of a module's MACs, or of its output where it has none, that pruning left."""
    if after is None:
        return 0.0
    kind = "macs" if before["macs"] else "activation_bytes"
    return after[kind] / before[kind] if before[kind] else 1.0


def by_part(latency_ms):
    """Sums by the first name of each module's path."""
    total = Counter()
    for name, value in latency_ms.items():
        total[name.partition(".")[0] or OTHER] += value
    return total


def profile(context, recipe, checkpoints):
    """ONNX Runtime's milliseconds by part for each network, of single-threaded runs in alternating rounds."""
    models = [export_onnx(context, each, recipe.export, Precision.FP32).handle for each in checkpoints]
    rounds = [[profiled(context, model) for model in models] for _ in range(ROUNDS)]
    return [
        Counter({part: statistics.median(one[index][part] for one in rounds) for part in rounds[0][index]})
        for index in range(len(models))
    ]


def profiled(context, model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    inputs = {name: tensor.numpy() for name, tensor in context.workload.example_inputs().items()}
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(
            context.store.open(model), options, providers=["CPUExecutionProvider"]
        )
        for _ in range(RUNS):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    total = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time"):
            total[part_of(event["name"])] += event["dur"] / 1e3 / RUNS
    return total


def part_of(node):
    """The part that an exported node belongs to, by its name; ONNX Runtime's own copies and transposes have none."""
    _, network, path = node.partition("/network/")
    return path.partition("/")[0] if network else OTHER


def print_table(analysed, predicted, measured, onnx_before, onnx_after):
    print(
        "|", " | ".join([*TITLES, "ONNX Runtime ms", "its share"]), "|\n| :-- |", "--: | " * (len(TITLES) + 1)
    )
    for part, value in analysed.most_common():
        cells = [f"{value:.2f}", f"{predicted[part]:.2f}", f"{measured[part]:.2f}"]
        cells += [share(predicted, part), share(measured, part)]
        cells += [f"{onnx_before[part]:.2f} to {onnx_after[part]:.2f}"]
        cells += [f"{share(onnx_before, part)} to {share(onnx_after, part)}"]
        print("|", " | ".join([part, *cells]), "|")


def share(latency_ms, part):
    return f"{latency_ms[part] / sum(latency_ms.values()):.1%}"


if __name__ == "__main__":
    main()

"""How often verdicts on latency are right: real runs on this machine, resampled, and live duels beside them.

    .venv/bin/python tests/benchmarks/operating_curve.py runs.jsonl [--pairs 200] [--live 60] [--chart FILE]

Engines are chains of equal convolutions on the loopback target; one with more layers is slower by what these take.
Pairs are of the chain of 40 with another or with itself, two runs of their own in drawn order. The file grows line by
line, so that the same command goes on where it ended; with all pairs and live verdicts in it, it only computes.

Resampled sessions draw from the noise of all pairs, which is what is left of each without the shift of its engine,
and add a shift, and where the row says so drift or heavy tails. A live verdict is a duel with runs of its own.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jetway.configs.schema import BenchmarkConfig, Target
from jetway.flows.in_turns import duel_engines, measure_once, one_run
from jetway.tasks.chart import DPI, new_canvas
from jetway.tasks.paired_tests import median_shift
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.target.session import open_target
from jetway.tasks.verdict import LOOKS, Change, judge, timing_evidence

CHAMPION, CANDIDATES, LIVE = 40, (40, 41, 42, 44), (40, 42)
SIDES = ("champion", "candidate")
RUN_CONFIG = one_run(BenchmarkConfig())
SESSIONS = 2000
CURVE = np.arange(0.0, 0.1025, 0.005)
DRIFT = 0.01  # of the latency, from one run to the next
TITLES = ("sessions", "slowdown", *Change, "REGRESSED in 10 pairs", "pairs", "coverage")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--pairs", type=int, default=200, help="of runs")
    parser.add_argument("--live", type=int, default=60, help="verdicts")
    parser.add_argument("--chart", type=Path)
    arguments = parser.parse_args()
    collect(arguments.file, {"pair": arguments.pairs, "live": arguments.live})
    report(lines(arguments.file, "pair"), lines(arguments.file, "live"), arguments.chart)


def collect(path, wanted):
    """Appends what is missing to the file."""
    if all(len(lines(path, kind)) >= count for kind, count in wanted.items()):
        return
    with tempfile.TemporaryDirectory() as folder, on_loopback(Path(folder)) as measured:
        for kind, measure in (("pair", measure_pair), ("live", measure_live)):
            for number in range(len(lines(path, kind)), wanted[kind]):
                line = {"kind": kind, "at": time.time(), **measure(number, *measured)}
                with path.open("a") as file:
                    print(json.dumps(line), file=file)
                print(f"{kind} {number + 1} of {wanted[kind]}: {line}", file=sys.stderr, flush=True)


@contextmanager
def on_loopback(folder):
    """A context, a session on this machine, and the engines by number of layers."""
    sys.path.append(str(Path(__file__).parents[1]))
    from doubles.chain import ChainWorkload, build_chain

    context = StageContext(ChainWorkload(), Store(folder / "store"), threads=1)
    with open_target(Target(name="loopback", kind="loopback")) as session:
        yield context, session, {layers: build_chain(context, session, layers) for layers in CANDIDATES}


def measure_pair(number, context, session, engines):
    """Each candidate comes once in as many pairs as there are candidates."""
    turn, place = divmod(number, len(CANDIDATES))
    candidate = random.Random(turn).sample(CANDIDATES, len(CANDIDATES))[place]
    pair = {"champion": engines[CHAMPION], "candidate": engines[candidate]}
    results = {
        side: measure_once(context, session, pair, RUN_CONFIG, side)
        for side in random.Random(-number).sample(SIDES, 2)
    }
    return {
        "candidate": candidate,
        "p50_ms": {side: result.variants[side].latency.p50_ms for side, result in results.items()},
        "canary_p50_ms": {side: result.canary.p50_ms for side, result in results.items()},
        "valid": {side: result.validity.valid for side, result in results.items()},
    }


def measure_live(number, context, session, engines):
    candidate = LIVE[number % len(LIVE)]
    pair = {"champion": engines[CHAMPION], "candidate": engines[candidate]}
    context.seed = number
    result = duel_engines(context, session, pair, BenchmarkConfig())
    told = result.verdict.model_dump(mode="json", include={"change", "effect", "interval", "count"})
    return {"candidate": candidate, "runs": len(result.runs), "seconds": result.seconds, **told}


def lines(path, kind):
    text = path.read_text() if path.exists() else ""
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def report(pairs, live, chart):
    """Prints the table of resampled and live verdicts, and draws the curve."""
    shifts = {candidate: log_ratios(pairs, candidate) for candidate in CANDIDATES}
    slowdowns = {candidate: np.expm1(median_shift(values)[0]) for candidate, values in shifts.items()}
    noise = np.concatenate([values - np.log1p(slowdowns[candidate]) for candidate, values in shifts.items()])
    if len(noise) < max(LOOKS):
        sys.exit(
            f"{len(noise)} VALID pairs are too few to draw sessions of {max(LOOKS)} from; raise --pairs."
        )
    print(f"{2 * len(pairs)} runs; noise of the {len(noise)} VALID pairs: ", end="")
    print(f"standard deviation {noise.std():.2%}, widest {abs(noise).max():.2%}; ", end="")
    print(f"of the latencies themselves, not in canaries, {clock_noise(pairs):.2%}.\n")
    print(f"| {' | '.join(TITLES)} |\n| :-- |{' --: |' * (len(TITLES) - 1)}")
    for name, disturb in (("as they are", undisturbed), ("drift", drift), ("heavy tails", heavy_tails)):
        for candidate in CANDIDATES:
            slowdown = 0.0 if candidate == CHAMPION else slowdowns[candidate]
            print_row(f"{SESSIONS:,}, {name}", slowdown, simulated(noise, slowdown, disturb))
    for candidate in LIVE:
        found = [line for line in live if line["candidate"] == candidate]
        if found:
            print_row(f"{len(found)} live", 0.0 if candidate == CHAMPION else slowdowns[candidate], found)
    if chart:
        draw(chart, noise, live, slowdowns)


def clock_noise(pairs):
    shifts = [log_ratios(pairs, candidate, in_canaries=False) for candidate in CANDIDATES]
    return np.concatenate([values - median_shift(values)[0] for values in shifts]).std()


def log_ratios(pairs, candidate, *, in_canaries=True):
    """Of the pairs with this candidate in which both runs are VALID."""
    valid = [pair for pair in pairs if pair["candidate"] == candidate and all(pair["valid"].values())]
    scaled = [
        {side: pair["p50_ms"][side] / (pair["canary_p50_ms"][side] if in_canaries else 1.0) for side in SIDES}
        for pair in valid
    ]
    return np.log([sides["candidate"] / sides["champion"] for sides in scaled])


def undisturbed(rng, noise):
    return noise


def drift(rng, noise):
    return noise + DRIFT * rng.choice((-1, 1), noise.shape)


def heavy_tails(rng, noise):
    """Student's t with two degrees of freedom, as wide as the noise, for each run."""
    return noise + noise.std() / 2 * (rng.standard_t(2, noise.shape) - rng.standard_t(2, noise.shape))


def simulated(noise, slowdown, disturb):
    """Verdicts of sessions that draw their pairs from the noise."""
    rng = np.random.default_rng(0)
    drawn = np.array([rng.choice(noise, max(LOOKS), replace=False) for _ in range(SESSIONS)])
    return [session_verdict(values) for values in np.exp(disturb(rng, drawn)) * (1 + slowdown)]


def session_verdict(ratios):
    for look, alpha in LOOKS.items():
        found = judge({"p50": timing_evidence([1.0] * look, ratios[:look])}, alpha=alpha)["p50"]
        if found.change is not Change.UNKNOWN:
            break
    return {"change": found.change, "count": found.count, "interval": found.interval}


def print_row(name, slowdown, verdicts):
    changes = Counter(verdict["change"] for verdict in verdicts)
    shares = [f"{changes[change] / len(verdicts):.2%}" for change in Change]
    pairs = np.mean([verdict["count"] for verdict in verdicts])
    bounded = [verdict["interval"] for verdict in verdicts if verdict["interval"]]
    coverage = np.mean([low <= slowdown <= high for low, high in bounded])
    cells = [
        f"{slowdown:.2%}",
        *shares,
        f"{found_within(verdicts, 10):.2%}",
        f"{pairs:.1f}",
        f"{coverage:.2%}",
    ]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def found_within(verdicts, pairs):
    found = [verdict["change"] == Change.REGRESSED and verdict["count"] <= pairs for verdict in verdicts]
    return float(np.mean(found))


def draw(path, noise, live, slowdowns):
    """Share of REGRESSED against the slowdown, by 10 and by 20 pairs, with the live verdicts as dots."""
    canvas = new_canvas(7, 4)
    axes = canvas.subplots()
    verdicts = [simulated(noise, slowdown, undisturbed) for slowdown in CURVE]
    for pairs, style in ((10, "-"), (max(LOOKS), "--")):
        shares = [found_within(found, pairs) for found in verdicts]
        axes.plot(100 * CURVE, shares, style, label=f"within {pairs} pairs of runs")
    for candidate in LIVE:
        found = [line for line in live if line["candidate"] == candidate]
        if found:
            slowdown = 0.0 if candidate == CHAMPION else slowdowns[candidate]
            label = f"{len(found)} live duels at {slowdown:.1%}"
            axes.plot(100 * slowdown, found_within(found, 10), "o", color="black", label=label)
    axes.set_xlabel("real slowdown, %")
    axes.set_ylabel("share of sessions that say REGRESSED")
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.savefig(path, dpi=DPI)


if __name__ == "__main__":
    main()

"""A double of trtexec: it takes the flags of a version, refuses others, and prints and exports in that version's form.

Its times are made up (TENSORRT_DOUBLE_KERNEL_MS, 1 by default, for the compute of a query): it is there for those who
call trtexec and read it, and says nothing about any engine. The version is TENSORRT_DOUBLE_VERSION.
TRTEXEC_DOUBLE_FAULT=fail makes it fail after the engine is loaded.
"""

import json
import os
import random
import sys

FLAGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data", "trtexec", "flags.tsv")
#: Its defaults: transfers, CUDA graph, busy wait. TensorRT 11 turned them round.
OLD_DEFAULTS = {"transfers": True, "graph": False, "spin": False}
NEW_DEFAULTS = {"transfers": False, "graph": True, "spin": True}
SWITCHES = {
    "--useCudaGraph": ("graph", True),
    "--noCudaGraph": ("graph", False),
    "--noDataTransfers": ("transfers", False),
    "--includeDataTransfers": ("transfers", True),
    "--useSpinWait": ("spin", True),
    "--noSpinWait": ("spin", False),
}
STAMP = "[01/31/2026-12:00:00] "


def parts(version):
    return [int(part) for part in version.split(".")][:3]


def known_flags(version):
    """From the table: a flag is there from its first version to its last."""
    found = []
    with open(FLAGS) as file:
        for line in file.read().splitlines()[1:]:
            flag, first, last = line.split("\t")
            since = not first or parts(version) >= parts(first)
            until = not last or parts(version)[:2] <= parts(last)[:2]
            if since and until:
                found.append(flag)
    return found


def number(version):
    major, minor, patch = parts(version)
    return major * (1000 if major < 10 else 10000) + minor * 100 + patch


def say(text, level="I"):
    print(f"{STAMP}[{level}] {text}")


def end(verdict, version, arguments):
    line = "&&&& {} TensorRT.trtexec [TensorRT v{}] # trtexec {}"
    print(line.format(verdict, number(version), " ".join(arguments)))
    return 0 if verdict == "PASSED" else 1


def main(arguments):
    version = os.environ["TENSORRT_DOUBLE_VERSION"]
    known = known_flags(version)
    if "--help" in arguments:
        print("=== Model Options ===")
        for flag in known:
            print(f"  {flag:<28} This is the double's help.")
        return 0
    given = dict(argument.partition("=")[::2] for argument in arguments)
    unknown = [flag for flag in given if flag not in known]
    if unknown:
        for flag in unknown:
            say(f"Unknown option: {flag} {given[flag]}", "E")
        return end("FAILED", version, arguments)
    print("TRTEXEC DOUBLE: what follows was measured on nothing.")
    return run(version, given, arguments)


def run(version, given, arguments):
    modes = dict(NEW_DEFAULTS if parts(version)[0] >= 11 else OLD_DEFAULTS)
    for flag, (mode, value) in SWITCHES.items():
        if flag in given:
            modes[mode] = value
    for name, mode in (("Data transfers", "transfers"), ("Spin-wait", "spin"), ("CUDA Graph", "graph")):
        say("{}: {}".format(name, "Enabled" if modes[mode] else "Disabled"))
    if not os.path.isfile(given.get("--loadEngine", "")):
        say("Could not open the engine {}".format(given.get("--loadEngine")), "E")
        return end("FAILED", version, arguments)
    if os.environ.get("TRTEXEC_DOUBLE_FAULT") == "fail":
        say("The environment asks for this fault.", "E")
        return end("FAILED", version, arguments)
    report(version, modes, trace(modes, given), given)
    return end("PASSED", version, arguments)


def trace(modes, given):
    """Queries back to back, the warm-up among them."""
    kernel_ms = float(os.environ.get("TENSORRT_DOUBLE_KERNEL_MS") or 1.0)
    end_ms = float(given.get("--warmUp", 200)) + float(given.get("--duration", 3)) * 1000
    queries, now, source = [], 0.0, random.Random(0)
    while now < end_ms or len(queries) < 10:
        copies = kernel_ms * 0.1 * modes["transfers"]
        h2d, d2h = copies * source.uniform(0.9, 1.1), copies * source.uniform(0.4, 0.6)
        compute = kernel_ms * source.uniform(0.995, 1.01)
        queries.append(
            {"start": now, "h2d": h2d, "compute": compute, "d2h": d2h, "enqueue": kernel_ms * 0.02}
        )
        now += compute + 0.002
    return queries


def report(version, modes, queries, given):
    old = parts(version) < [8, 5]
    kept = [query for query in queries if query["start"] + query["h2d"] >= float(given.get("--warmUp", 200))]
    last = kept[-1]
    wall_ms = last["start"] + last["h2d"] + last["compute"] + last["d2h"] - kept[0]["start"]
    say("")
    say("=== Performance summary ===")
    say(f"Throughput: {len(kept) / wall_ms * 1000:g} qps")
    say("Latency: " + statistics([q["h2d"] + q["compute"] + q["d2h"] for q in kept], old))
    if old:
        say("End-to-End Host Latency: " + statistics([1.9 * q["compute"] for q in kept], old))
    for name, key in (("Enqueue Time", "enqueue"), ("H2D Latency", "h2d")):
        say(f"{name}: {statistics([query[key] for query in kept], old)}")
    say("GPU Compute Time: " + statistics([query["compute"] for query in kept], old))
    say("D2H Latency: " + statistics([query["d2h"] for query in kept], old))
    say(f"Total Host Walltime: {wall_ms / 1000:g} s")
    say("Total GPU Compute Time: {:g} s".format(sum(query["compute"] for query in kept) / 1000))
    say("* GPU compute time is unstable, with coefficient of variance = 2.6%.", "W")
    say("  If not already in use, locking GPU clock frequency or adding --useSpinWait may help.", "W")
    if "--exportTimes" in given:
        export_times(given["--exportTimes"], queries if old else kept, old)


def statistics(values, old):
    ordered = sorted(values)
    count = len(ordered)
    texts = [f"min = {ordered[0]:g} ms, max = {ordered[-1]:g} ms"]
    texts += [f"mean = {sum(ordered) / count:g} ms, median = {ordered[count // 2]:g} ms"]
    for percent in [99] if old else [90, 95, 99]:
        value = ordered[max(count - 1 - int((1 - percent / 100.0) * count), 0)]
        texts.append(f"percentile({percent}%) = {value:g} ms")
    return ", ".join(texts)


def export_times(path, queries, old):
    rows = []
    for query in queries:
        start = query["start"]
        compute_start = start + query["h2d"]
        row = {
            "startEnqMs": start,
            "endEnqMs": start + query["enqueue"],
            "startH2dMs": start,
            "endH2dMs": compute_start,
            "startComputeMs": compute_start,
            "endComputeMs": compute_start + query["compute"],
            "h2dMs": query["h2d"],
            "computeMs": query["compute"],
            "d2hMs": query["d2h"],
            "latencyMs": query["h2d"] + query["compute"] + query["d2h"],
        }
        if old:
            row["endToEndMs"] = 1.9 * query["compute"]
        rows.append({name: float(f"{value:g}") for name, value in row.items()})
    with open(path, "w") as file:
        json.dump(rows, file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

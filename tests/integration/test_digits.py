"""The reference recipe, whole: what `make demo` shows. Minutes long; run with `make slow-test`, machine at rest."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from jetway.tasks.statistics import paired_ratio, round_medians
from jetway.tasks.tracking.tracker import Tracker

pytestmark = [pytest.mark.serial, pytest.mark.slow]

PIPELINE_LIMIT_S = 360
COLD_OVERHEAD_LIMIT_S, WARM_OVERHEAD_LIMIT_S = 30, 10


def test_digits_reach_their_figures_twice(tmp_path, jetway, cli_home):
    first = jetway("run", "digits", "--json", cwd=tmp_path, timeout_s=900)
    assert first.exit_code == 0, first.stderr
    document = first.json
    assert all(row["validity"]["valid"] for row in document["variants"])
    assert document["overhead_s"] <= COLD_OVERHEAD_LIMIT_S
    assert sum(stage["seconds"] for stage in document["stages"]) <= PIPELINE_LIMIT_S

    baseline, int8 = first.metrics("baseline-fp32"), first.metrics("pruned-int8-qat")
    assert baseline["top1"] >= 0.970
    assert int8["macs_ratio"] <= 0.50
    assert int8["top1_drop"] <= 0.010
    assert int8["size_ratio"] <= 0.20
    assert int8["integer_macs_ratio"] >= 0.90
    assert upper_bound(cli_home, document, "baseline-fp32") <= 0.30
    assert upper_bound(cli_home, document, "pruned-fp32") <= 0.65

    again = jetway("run", "digits", "--json", cwd=tmp_path, timeout_s=60)
    assert again.exit_code == 0, again.stderr
    assert again.json["overhead_s"] <= WARM_OVERHEAD_LIMIT_S


def upper_bound(home, document, reference):
    """Upper end of the 95 % interval of pruned-int8-qat's p50 against another variant of the same session."""
    tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}")
    samples = load_file(
        tracker.load_file(document["run_id"], "targets/loopback/samples.safetensors", home / "samples")
    )
    medians = [
        round_medians(np.asarray(samples[f"{name}.latency_ns"]), np.asarray(samples[f"{name}.round"]))
        for name in ("pruned-int8-qat", reference)
    ]
    return paired_ratio(*medians, seed=0)[1][1]

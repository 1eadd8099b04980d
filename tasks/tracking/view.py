"""A table of all variants of a recipe, as a view that MLflow's pages share by an address.

MLflow keeps a shared view of an experiment's runs in a tag of the experiment, as what its page would send for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from jetway.tasks.tracking.values import KIND_TAG

#: Name of the view, as in its address.
VARIANTS = "variants"
VIEW_TAG = "mlflow.sharedViewState."

FILTER = f"tags.`{KIND_TAG}` = 'variant'"
MEASURED = (
    "latency_ms_p50",
    "latency_p50_ratio",
    "latency_ms_p99",
    "size_bytes",
    "size_ratio",
    "macs",
    "params",
)
JUDGED = ("validity", "gate")
WHERE = ("target", "board")


def variants_view(scores: Sequence[str]) -> dict[str, str]:
    """The experiment's tag of the view: fastest variants first, and of each where it ran, its scores, and what was
    judged of it.

    ``scores`` are the names of the recipe's own metrics and of what is lost of them.
    """
    state = {
        "searchFilter": FILTER,
        # Sorted by anything but the start, MLflow does not fold variants into their pipeline's run.
        "orderByKey": "metrics.`latency_ms_p50`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": [
            *(f"tags.`{name}`" for name in WHERE),
            *(f"metrics.`{name}`" for name in (*scores, *MEASURED)),
            *(f"tags.`{name}`" for name in JUDGED),
        ],
    }
    return {f"{VIEW_TAG}{VARIANTS}": json.dumps(state)}

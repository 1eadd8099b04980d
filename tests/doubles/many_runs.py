"""Thousands of runs in MLflow's sqlite file, written past MLflow for the time it takes."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path


def add_runs(
    database: Path,
    experiment_id: str,
    tags: Sequence[Mapping[str, str]],
    *,
    metrics: int = 3,
    params: int = 0,
) -> None:
    """Rows of a finished run for each dict of tags, the oldest first, with so many figures each."""
    ids = [f"{index:032x}" for index in range(len(tags))]
    with sqlite3.connect(database) as connection:
        columns = "run_uuid, name, experiment_id, start_time, status, lifecycle_stage, artifact_uri, user_id"
        connection.executemany(
            f"INSERT INTO runs ({columns}) VALUES (?, ?, ?, ?, 'FINISHED', 'active', '/nowhere', '')",
            [(run_id, f"digits {index}", experiment_id, index) for index, run_id in enumerate(ids)],
        )
        connection.executemany(
            "INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)",
            [(*tag, run_id) for run_id, all_tags in zip(ids, tags, strict=True) for tag in all_tags.items()],
        )
        connection.executemany(
            "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) VALUES (?, 1.0, 0, 0, 0, ?)",
            [(f"metric {number}", run_id) for run_id in ids for number in range(metrics)],
        )
        connection.executemany(
            "INSERT INTO params (key, value, run_uuid) VALUES (?, '1', ?)",
            [(f"param {number}", run_id) for run_id in ids for number in range(params)],
        )

"""What a frame costs on a target from its capture to its results, by step, and how many pass a second."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import load_file

from jetway.tasks.artifacts import SCHEMA_VERSION, Tensors
from jetway.tasks.measurement import LatencySummary
from jetway.tasks.results import Interval, Validity
from jetway.tasks.statistics import rate

STEPS = ("capture", "preprocess", "infer", "postprocess")
END_TO_END = "end_to_end"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rate(_Value):
    """Frames a second over all counted rounds, with its 95 % interval."""

    value: float
    interval: Interval

    @classmethod
    def of(cls, frames: int, seconds: NDArray[np.float64], seed: int) -> Rate:
        """Of rounds of so many frames each, by the seconds that each took."""
        value, interval = rate(np.full(len(seconds), frames), seconds, seed=seed)
        return cls(value=value, interval=interval)


class VariantStream(_Value):
    """The frames of one variant."""

    steps: dict[str, LatencySummary] = Field(description="Of each step, and end_to_end, one frame at a time.")
    one_by_one_fps: Rate = Field(description="Frames a second, each finished before the next is captured.")
    pipelined_fps: Rate = Field(
        description="With capture and preprocessing, inference, and postprocessing side by side."
    )

    def metrics(self) -> dict[str, float | None]:
        """By the names that the stage table and MLflow use."""
        return {
            **{f"{step}_ms_p50": times.p50_ms for step, times in self.steps.items()},
            "end_to_end_ms_p99": self.steps[END_TO_END].p99_ms,
            "stream_fps": self.one_by_one_fps.value,
            "stream_fps_pipelined": self.pipelined_fps.value,
        }

    def intervals(self) -> dict[str, Interval]:
        """95 % intervals, by the same names."""
        return {
            **{f"{step}_ms_p50": times.intervals_ms["p50"] for step, times in self.steps.items()},
            "stream_fps": self.one_by_one_fps.interval,
            "stream_fps_pipelined": self.pipelined_fps.interval,
        }


class StreamResult(_Value):
    """One session of frames on one target, all its variants in turns."""

    schema_version: int = SCHEMA_VERSION
    target: str
    variants: dict[str, VariantStream]
    validity: Validity
    simulated: bool = False
    source: str = Field(description="Name of the video or folder, or 'evaluation data'.")
    source_sha256: str
    frame_size: tuple[int, int] = Field(description="Width and height of the frames as they were captured.")
    samples: Tensors = Field(description="NAME.STEP_ns (int64) and NAME.round (int32) of every frame.")
    rounds: int
    excluded_rounds: tuple[int, ...] = Field(description="Rounds in which other processes held the CPU.")
    slice_frames: int = Field(description="Frames of one variant in a round.")
    queue_frames: int = Field(description="Frames that may wait between two steps of the pipeline.")
    boot_id: str


def measure_streams(
    samples: Path, names: Sequence[str], result: Mapping[str, Any], *, seed: int
) -> dict[str, VariantStream]:
    """What each variant's frames took, from the session's samples without its excluded rounds."""
    arrays = load_file(samples)
    return {name: _measure(arrays, name, result, seed) for name in names}


def _measure(
    arrays: Mapping[str, NDArray[Any]], name: str, result: Mapping[str, Any], seed: int
) -> VariantStream:
    steps, one_by_one_s = summarize_steps(arrays, name, STEPS, result["excluded_rounds"], seed=seed)
    counted = [index for index in range(result["rounds"]) if index not in result["excluded_rounds"]]
    side_by_side_s = np.array(result["side_by_side_ns"][name])[counted] / 1e9
    frames = result["slice_frames"]
    return VariantStream(
        steps=steps,
        one_by_one_fps=Rate.of(frames, one_by_one_s, seed),
        # between the first results of a slice and its last lie the frames behind the first
        pipelined_fps=Rate.of(frames - 1, side_by_side_s, seed),
    )


def summarize_steps(
    arrays: Mapping[str, NDArray[Any]],
    name: str,
    steps: Sequence[str],
    excluded_rounds: Sequence[int],
    *,
    seed: int,
) -> tuple[dict[str, LatencySummary], NDArray[np.float64]]:
    """Times of each step and end to end without the excluded rounds, and the seconds of each round that counts."""
    counted = ~np.isin(arrays[f"{name}.round"], excluded_rounds)
    rounds = arrays[f"{name}.round"][counted]
    times_ns = {step: arrays[f"{name}.{step}_ns"][counted] for step in steps}
    total_ns = np.sum(list(times_ns.values()), axis=0)
    seconds = np.array([total_ns[rounds == index].sum() for index in np.unique(rounds)]) / 1e9
    summaries = {
        step: LatencySummary.of(values, rounds, seed=seed)
        for step, values in {**times_ns, END_TO_END: total_ns}.items()
    }
    return summaries, seconds


def stream_markdown(result: StreamResult, *, where: str) -> str:
    """Milliseconds at the median by step, and frames a second, a row for each variant."""
    titles = ("variant", *STEPS, "end to end", "p99", "FPS", "FPS pipelined")
    width, height = result.frame_size
    lines = [
        f"**Frames on {where}**: ms at the median, of {result.source}, {width} x {height}"
        + ("" if result.validity.valid else f" (INVALID: {'; '.join(result.validity.reasons)})"),
        "",
        f"| {' | '.join(titles)} |",
        f"| :-- |{' --: |' * (len(titles) - 1)}",
    ]
    return "\n".join([*lines, *(_line(name, found) for name, found in result.variants.items())]) + "\n"


def _line(name: str, found: VariantStream) -> str:
    medians = [found.steps[step].p50_ms for step in (*STEPS, END_TO_END)]
    cells = [_number(value) for value in (*medians, found.steps[END_TO_END].p99_ms)]
    rates = [f"{fps.value:.1f}" for fps in (found.one_by_one_fps, found.pipelined_fps)]
    return f"| {' | '.join([name, *cells, *rates])} |"


def _number(value_ms: float | None) -> str:
    return "-" if value_ms is None else f"{value_ms:.3f}"


def stream_csv(result: StreamResult) -> str:
    """Every percentile of every step, a line for each variant and step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("variant", "step", "frames", "mean_ms", "p50_ms", "p90_ms", "p99_ms"))
    for name, found in result.variants.items():
        for step, times in found.steps.items():
            figures = (times.mean_ms, times.p50_ms, times.p90_ms, times.p99_ms)
            writer.writerow((name, step, times.count, *figures))
    return text.getvalue()

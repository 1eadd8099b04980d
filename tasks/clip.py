"""The frames that a target is measured on: a user's video or folder of images, or a clip of the evaluation data."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from jetway.configs.schema import StreamConfig
from jetway.tasks.artifacts import Clip
from jetway.tasks.errors import ConfigError, WorkloadError
from jetway.tasks.frames import FrameProcessing
from jetway.tasks.store import Store
from jetway.tasks.workload import Workload

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"}
# The first moment that a zip file can name: the same images give the same bytes.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def check_stream(config: StreamConfig | None, source: Path | None, workload: Workload) -> None:
    """Raises ConfigError or WorkloadError when ``benchmark.stream`` asks for frames that cannot be had."""
    if config is None:
        return
    frame_processing_of(workload)
    if source is None:
        return
    if not source.exists():
        raise ConfigError(
            f"benchmark.stream.source: {source} is not there. Name a video or a folder of images relative to the "
            "recipe, or leave it out to stream the evaluation data."
        )
    if source.is_dir() and not images_of(source):
        raise ConfigError(
            f"benchmark.stream.source: {source} holds no image. Put some of {', '.join(sorted(IMAGE_SUFFIXES))} "
            "into it."
        )


def frame_processing_of(workload: Workload) -> FrameProcessing:
    """What the workload declares of frames. Raises ConfigError without it, WorkloadError when it is not so."""
    frames, name = workload.frame_processing(), type(workload).__qualname__
    if frames is None:
        raise ConfigError(
            f"benchmark.stream needs {name}.frame_processing(), which says how a frame becomes the network's input "
            "and its outputs results. Override it (jetway.tasks.frames), or leave benchmark.stream out."
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in workload.example_inputs().items()}
    declared = {frames.input.name: frames.input.shape}
    if shapes != declared:
        raise WorkloadError(
            f"{name}.frame_processing() declares the input {declared}, but example_inputs() gives {shapes}. Frames "
            "serve networks with one image as input, one at a time: make both the same."
        )
    missing = set(frames.outputs) - set(workload.output_names)
    if missing:
        raise WorkloadError(
            f"{name}.frame_processing() names the outputs {sorted(missing)}, but output_names is "
            f"{list(workload.output_names)}. Make both the same."
        )
    return frames


def make_clip(store: Store, workload: Workload, config: StreamConfig, source: Path | None) -> Clip:
    """The frames as one file in the store: the user's own, or the first ones of the evaluation data."""
    with store.scratch() as folder:
        path = folder / "clip"
        if source is None:
            np.save(path.with_suffix(".npy"), evaluation_frames(workload, config))
            path = path.with_suffix(".npy")
        elif source.is_dir():
            zip_images(source, path)
        else:
            shutil.copyfile(source, path)
        return store.add(Clip, path, metadata={"source": source.name if source else "evaluation data"})


def evaluation_frames(workload: Workload, config: StreamConfig) -> NDArray[np.uint8]:
    """Frames [n, height, width, channels] that become samples of the evaluation data, scaled to ``frame_size``."""
    declared, data = frame_processing_of(workload).input, workload.evaluation_data()
    count = min(config.clip_frames, len(data))  # type: ignore[arg-type]
    frames = [declared.frame_of(data[index][0][declared.name]) for index in range(count)]
    return np.stack([scaled(frame, config.frame_size or declared.size) for frame in frames])


def scaled(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The frame at another width and height."""
    if frame.shape[1::-1] == size:
        return frame
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    resized = functional.interpolate(pixels, size=size[::-1], mode="bilinear", align_corners=False)
    return np.ascontiguousarray(resized[0].round().byte().permute(1, 2, 0).numpy())


def images_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def zip_images(folder: Path, archive: Path) -> None:
    """The folder's images, uncompressed, as decoding is what is measured."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for path in images_of(folder):
            file.writestr(zipfile.ZipInfo(path.name, ZIP_EPOCH), path.read_bytes())

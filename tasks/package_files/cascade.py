"""Runs both engines as one: the detector beside this file, and the one in classifier/ on what the detector finds.

python3 cascade.py                 what is in sample_frames.npy: a line of JSON each frame
python3 cascade.py FRAMES          in frames of your own: .npy, .y4m, an image, a zip of images, a video
python3 cascade.py --save FILE     writes the lines into a file
python3 cascade.py --check         compares with expected_cascade.jsonl; exit status 1 when they differ
python3 cascade.py --time          median time of every step as well
"""

import argparse
import json
import os
import statistics
import sys
from contextlib import ExitStack
from typing import Any, Dict, List, Optional

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# It stands beside this file in a package, and puts runtime.zip on the path.
import infer  # type: ignore[import-not-found]  # noqa: E402

from jetway.tasks.on_device import cascade, passport  # noqa: E402
from jetway.tasks.on_device.errors import DeviceError  # noqa: E402
from jetway.tasks.on_device.frames import source  # noqa: E402

FOLDERS = {"detector": infer.HERE, "classifier": os.path.join(infer.HERE, "classifier")}
#: Largest errors that --check accepts, in pixels and of a score.
MAX_PIXELS, MAX_SCORE = 0.5, 0.02

Json = Dict[str, Any]


def detect(path: str) -> "Detections":
    """Every frame of a file, through both engines."""
    with open(infer.path_of("cascade.json")) as file:
        settings = json.load(file)
    count = sum(1 for _ in source.reader_of(path)(path))
    with ExitStack() as stack:
        halves = []
        for role in cascade.ROLES:
            found = infer.read_passport(FOLDERS[role])
            infer.check_passport(found, FOLDERS[role])
            session = stack.enter_context(infer.opened(found, FOLDERS[role]))
            halves.append(cascade.Half(session, settings[role]))
        unit = cascade.Cascade(source.FrameSource(path), halves[0], halves[1], dict(settings, frames=count))
        unit.run_frames(count)
    labels = infer.read_labels(FOLDERS["classifier"])
    return Detections([objects_of(result, labels) for result in unit.results], unit.times_ns)


class Detections:
    """What was found in each frame, and how long each step took."""

    def __init__(self, frames: List[List[Json]], times_ns: Json) -> None:
        self.frames, self.times_ns = frames, times_ns

    def lines(self) -> List[str]:
        return [
            json.dumps({"frame": number, "objects": objects}, sort_keys=True, ensure_ascii=False)
            for number, objects in enumerate(self.frames)
        ]


def objects_of(result: Json, labels: List[str]) -> List[Json]:
    """Boxes are left, top, right and bottom in pixels of the frame."""
    return [
        {
            "box": [round(float(side), 2) for side in box],
            "score": round(float(score), 4),
            "label": labels[label] if labels else int(label),
        }
        for box, score, label in zip(result["boxes"], result["scores"], result["labels"])
    ]


def check(frames: List[List[Json]], expected: List[List[Json]]) -> bool:
    """Whether the same objects are at the same places; says which frame differs first."""
    for number, (found, wanted) in enumerate(zip(frames, expected)):
        if len(found) != len(wanted) or not all(map(is_same, found, wanted)):
            print("FAIL: frame {}: {}, expected {}".format(number, found, wanted))
            return False
    print("PASS: {} objects in {} frames".format(sum(map(len, frames)), len(frames)))
    return len(frames) == len(expected)


def is_same(found: Json, wanted: Json) -> bool:
    pixels = max(abs(one - other) for one, other in zip(found["box"], wanted["box"]))
    near = pixels <= MAX_PIXELS and abs(found["score"] - wanted["score"]) <= MAX_SCORE
    return near and bool(found["label"] == wanted["label"])


def read_expected() -> List[List[Json]]:
    with open(infer.path_of("expected_cascade.jsonl"), "rb") as file:
        return [json.loads(line.decode("utf-8"))["objects"] for line in file]


def save(lines: List[str], path: str) -> None:
    with open(path, "wb") as file:
        file.write("".join(line + "\n" for line in lines).encode("utf-8"))
    print("saved: sha256 {} {}".format(passport.file_sha256(path), path))


def parse(arguments: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs both engines of this folder as one.")
    parser.add_argument("frames", nargs="?", default=infer.path_of("sample_frames.npy"))
    parser.add_argument("--save", metavar="FILE", help="write what was found as lines of JSON")
    parser.add_argument("--check", action="store_true", help="compare with expected_cascade.jsonl")
    parser.add_argument("--time", action="store_true", help="print the median time of every step")
    return parser.parse_args(arguments)


def main(arguments: Optional[List[str]] = None) -> int:
    asked = parse(arguments)
    found = detect(asked.frames)
    if asked.time:
        for step, times_ns in found.times_ns.items():
            print(
                "{}: p50 {:.3f} ms of {} frames".format(
                    step, statistics.median(times_ns) / 1e6, len(times_ns)
                )
            )
    if asked.save:
        save(found.lines(), asked.save)
    if asked.check:
        return 0 if check(found.frames, read_expected()) else 1
    if not asked.save and not asked.time:
        print("\n".join(found.lines()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeviceError as refusal:
        sys.stderr.write("{}\n".format(refusal))
        sys.exit(infer.REFUSED)

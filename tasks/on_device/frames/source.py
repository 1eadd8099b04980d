"""Where frames come from: a .npy array, a .y4m video, a zipped folder of images, an image, or a video.

A file on a target has no suffix, so its first bytes tell what it is. Arrays, .y4m, PGM and PPM need numpy alone, JPEG
and PNG OpenCV or Pillow, and other videos OpenCV.
"""

import io
import re
import zipfile
from typing import Any, BinaryIO, Callable, Iterator, Optional, Tuple

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError

#: Of a video's colour space, how many pixels across and down share a colour; a mono one has none.
CHROMA = {
    "mono": None,
    "420": (2, 2),
    "420jpeg": (2, 2),
    "420mpeg2": (2, 2),
    "420paldv": (2, 2),
    "422": (2, 1),
    "444": (1, 1),
}
Chroma = Optional[Tuple[int, int]]


class FrameSource:
    """The frames of a file, from the first again when they are over."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._open = reader_of(path)
        self._frames = iter(())  # type: Iterator[Any]

    def read(self) -> Any:
        """The next frame. Raises DeviceError (bad_request) for a file that has none."""
        frame = next(self._frames, None)
        if frame is None:
            self._frames = self._open(self.path)
            frame = next(self._frames, None)
        if frame is None:
            raise unreadable(self.path, "it holds no frame")
        return frame


def reader_of(path: str) -> Callable[[str], Iterator[Any]]:
    """What reads a file of this kind."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(b"\x93NUMPY"):
        return read_array
    if start.startswith(b"YUV4MPEG2"):
        return read_y4m
    if start.startswith(b"PK"):
        return read_images
    return read_image if is_image(start) else read_video


def is_image(start: bytes) -> bool:
    return start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM", b"P5", b"P6"))


def read_array(path: str) -> Iterator[Any]:
    """uint8 [frames, height, width, 1 or 3], mapped: a frame is read when it is asked for."""
    import numpy as np

    frames = np.load(path, mmap_mode="r")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (1, 3):
        found = "{}{}".format(frames.dtype, list(frames.shape))
        raise unreadable(path, "frames are uint8 [frames, height, width, 1 or 3], not " + found)
    for frame in frames:
        yield np.array(frame)


def read_images(path: str) -> Iterator[Any]:
    """The images of a zip file in the order of their names."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            yield decoded(archive.read(name), name)


def read_image(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        yield decoded(file.read(), path)


def decoded(data: bytes, name: str) -> Any:
    """The frame of an image file's bytes."""
    if data[:2] in (b"P5", b"P6"):
        return decoded_pnm(data, name)
    cv2, image_module = module("cv2"), module("PIL.Image")
    if cv2 is not None:
        return _decoded_by_opencv(cv2, data, name)
    if image_module is not None:
        return _decoded_by_pillow(image_module, data)
    raise missing("{} is neither PGM nor PPM".format(name), "OpenCV (python3-opencv) or Pillow (python3-pil)")


def _decoded_by_opencv(cv2: Any, data: bytes, name: str) -> Any:
    import numpy as np

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise unreadable(name, "OpenCV cannot decode it")
    return image[:, :, ::-1]


def _decoded_by_pillow(image_module: Any, data: bytes) -> Any:
    import numpy as np

    with image_module.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def decoded_pnm(data: bytes, name: str) -> Any:
    """Binary PGM or PPM with a byte a value."""
    import numpy as np

    header = re.match(rb"P([56])\s+(?:#.*\n\s*)*(\d+)\s+(\d+)\s+(\d+)\s", data)
    if header is None or int(header.group(4)) != 255:
        raise unreadable(name, "only PGM and PPM with values up to 255 are read")
    kind, width, height = (int(header.group(group)) for group in (1, 2, 3))
    shape = (height, width, 3 if kind == 6 else 1)
    pixels = np.frombuffer(data, np.uint8, offset=header.end())
    if pixels.size != shape[0] * shape[1] * shape[2]:
        raise unreadable(name, "it is cut off")
    return pixels.reshape(shape)


def read_y4m(path: str) -> Iterator[Any]:
    """Frames of an uncompressed video, limited range as cameras have it."""
    with open(path, "rb") as file:
        fields = file.readline().decode("ascii", "replace").split()
        values = {field[0]: field[1:] for field in fields[1:]}
        width, height = int(values["W"]), int(values["H"])
        space = values.get("C", "420")
        if space not in CHROMA:
            raise unreadable(
                path, "its colours are {}, not one of: {}".format(space, ", ".join(sorted(CHROMA)))
            )
        while file.readline().startswith(b"FRAME"):
            yield _read_planes(file, width, height, CHROMA[space], path)


def _read_planes(file: BinaryIO, width: int, height: int, chroma: Chroma, path: str) -> Any:
    luma = _plane(file, width, height, path)
    if chroma is None:
        return luma[:, :, None]
    across, down = chroma
    coloured = []  # type: Any
    for _ in range(2):
        plane = _plane(file, -(-width // across), -(-height // down), path)
        coloured.append(plane.repeat(down, axis=0).repeat(across, axis=1)[:height, :width])
    return rgb_of(luma, *coloured)


def _plane(file: BinaryIO, width: int, height: int, path: str) -> Any:
    import numpy as np

    data = file.read(width * height)
    if len(data) < width * height:
        raise unreadable(path, "its last frame is cut off")
    return np.frombuffer(data, np.uint8).reshape(height, width)


def rgb_of(luma: Any, blue: Any, red: Any) -> Any:
    """RGB of luma and colour differences by ITU-R BT.601, limited range."""
    import numpy as np

    grey = 1.164383 * (luma.astype(np.float32) - 16)
    blue, red = blue.astype(np.float32) - 128, red.astype(np.float32) - 128
    planes = [grey + 1.596027 * red, grey - 0.391762 * blue - 0.812968 * red, grey + 2.017232 * blue]
    return np.clip(np.rint(np.stack(planes, axis=2)), 0, 255).astype(np.uint8)


def read_video(path: str) -> Iterator[Any]:
    """What OpenCV can decode."""
    cv2 = module("cv2")
    if cv2 is None:
        raise missing("the source is not an image, .npy or .y4m", "OpenCV (python3-opencv)")
    video = cv2.VideoCapture(path)
    try:
        found, image = video.read()
        while found:
            yield image[:, :, ::-1]
            found, image = video.read()
    finally:
        video.release()


def module(name: str) -> Any:
    """A module of the target, or None where it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def missing(why: str, packages: str) -> DeviceError:
    return DeviceError(
        "{}, so the target needs {} for benchmark.stream. Install it there for the target's `python`, or give the "
        "recipe a source that numpy reads alone: a .y4m video, a folder of .ppm images, a .npy array.".format(
            why[0].upper() + why[1:], packages
        ),
        errors.MISMATCH,
    )


def unreadable(name: str, why: str) -> DeviceError:
    return DeviceError(
        "Cannot read the frames of {}: {}. Correct benchmark.stream.source in the recipe.".format(name, why),
        errors.BAD_REQUEST,
    )

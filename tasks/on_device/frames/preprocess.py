"""From a frame to the tensor that an engine takes, as the workload's ``FrameInput`` declares it."""

from typing import Any, Dict, Tuple

from jetway.tasks.on_device.frames import resize

#: ITU-R BT.601, as cameras and image libraries have it.
LUMA = (0.299, 0.587, 0.114)


class Placement:
    """Where a frame lies in the network's input: ``scale`` (x, y) and then ``offset`` (x, y), in pixels."""

    def __init__(self, scale: Tuple[float, float], offset: Tuple[int, int], frame: Tuple[int, int]) -> None:
        self.scale, self.offset = scale, offset
        #: Width and height of the frame.
        self.frame = frame

    def to_frame(self, boxes: Any) -> Any:
        """Boxes [n, 4] (x1, y1, x2, y2) of the network's input, in the frame's pixels and inside of it."""
        import numpy as np

        offset, scale = np.array(self.offset * 2), np.array(self.scale * 2)
        return np.clip((boxes - offset) / scale, 0, np.array(self.frame * 2)).astype(np.float32)


class Preprocessor:
    """Of a declaration: ``size`` (width, height), ``colour``, ``mean``, ``deviation``, ``keep_aspect``, ``padding``,
    ``dtype``."""

    def __init__(self, declared: Dict[str, Any]) -> None:
        import numpy as np

        self.width, self.height = declared["size"]
        self.colour, self.padding = declared["colour"], declared["padding"]
        self.keep_aspect, self.dtype = declared["keep_aspect"], np.dtype(declared["dtype"])
        self.mean = np.array(declared["mean"], np.float32)
        self.factor = 1 / np.array(declared["deviation"], np.float32)

    def __call__(self, frame: Any) -> Tuple[Any, Placement]:
        """The frame as a contiguous array [1, channels, height, width], and how it was placed."""
        import numpy as np

        placement = self.place(frame.shape[1], frame.shape[0])
        pixels = self._placed(self._coloured(frame), placement)
        if self.dtype == np.uint8:
            pixels = np.rint(pixels).astype(np.uint8)
        else:
            pixels = (pixels - self.mean) * self.factor
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]), placement

    def place(self, width: int, height: int) -> Placement:
        """Scaled to fill the input, or to fit into its middle where the aspect is kept."""
        if not self.keep_aspect:
            return Placement((self.width / width, self.height / height), (0, 0), (width, height))
        scale = min(self.width / width, self.height / height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        offset = (self.width - inner[0]) // 2, (self.height - inner[1]) // 2
        return Placement((inner[0] / width, inner[1] / height), offset, (width, height))

    def _coloured(self, frame: Any) -> Any:
        import numpy as np

        if self.colour == "gray":
            return frame if frame.shape[2] == 1 else frame @ np.array(LUMA, np.float32)[:, None]
        frame = frame if frame.shape[2] == 3 else np.repeat(frame, 3, axis=2)
        return frame[:, :, ::-1] if self.colour == "bgr" else frame

    def _placed(self, frame: Any, placement: Placement) -> Any:
        import numpy as np

        width, height = (round(side * by) for side, by in zip(placement.frame, placement.scale))
        scaled = resize.bilinear(frame, width, height)
        if (width, height) == (self.width, self.height):
            return scaled
        canvas = np.full((self.height, self.width, scaled.shape[2]), self.padding, np.float32)
        x, y = placement.offset
        canvas[y : y + height, x : x + width] = scaled
        return canvas

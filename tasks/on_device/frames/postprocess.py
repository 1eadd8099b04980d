"""From an engine's outputs to results, as the workload declares them: classes, boxes or a mask of a frame."""

from typing import Any, Callable, Dict, List, Tuple

from jetway.tasks.on_device.frames import resize
from jetway.tasks.on_device.frames.preprocess import Placement

Arrays = Dict[str, Any]
#: Takes the outputs by name, batch dimension first, and where the frame lies in the input.
Postprocess = Callable[[Arrays, Placement], Arrays]


def postprocess_of(declared: Dict[str, Any], size: Tuple[int, int]) -> Postprocess:
    """What makes results of the kind declared; ``size`` is width and height of the network's input."""
    if declared["kind"] == "classes":
        return Classes(declared)
    return Boxes(declared, size) if declared["kind"] == "boxes" else Masks(declared, size)


class Classes:
    """The ``top`` classes of logits [1, classes]: ``labels`` and their ``scores``, best first."""

    def __init__(self, declared: Dict[str, Any]) -> None:
        self.output, self.top = declared["output"], declared["top"]

    def __call__(self, outputs: Arrays, placement: Placement) -> Arrays:
        import numpy as np

        logits = outputs[self.output].reshape(-1).astype(np.float64)
        best = np.argsort(-logits, kind="stable")[: self.top]
        weights = np.exp(logits - logits.max())
        return {"labels": best, "scores": weights[best] / weights.sum()}


class Boxes:
    """Boxes of an anchor-free detector: ``boxes`` [n, 4] in the frame's pixels, ``scores`` and ``labels``, best first.

    Outputs are class logits [1, classes, cells] and distances [1, 4, cells] from the middle of each cell to left,
    top, right and bottom, in strides; cells are those of the finest stride first, row by row.
    """

    def __init__(self, declared: Dict[str, Any], size: Tuple[int, int]) -> None:
        import numpy as np

        self.class_logits, self.distances = declared["class_logits"], declared["distances"]
        self.min_score, self.max_iou = declared["min_score"], declared["max_iou"]
        self.class_agnostic = declared["class_agnostic"]
        levels = [_cells(size, stride) for stride in declared["strides"]]
        self.centres = np.concatenate([centres for centres, _ in levels])
        self.strides = np.concatenate([strides for _, strides in levels])

    def __call__(self, outputs: Arrays, placement: Placement) -> Arrays:
        import numpy as np

        scores = 1 / (1 + np.exp(-outputs[self.class_logits][0].astype(np.float64)))
        labels, cells = np.nonzero(scores > self.min_score)
        boxes, scores = self.decode(outputs[self.distances][0], cells), scores[labels, cells]
        kept = suppress(boxes, scores, labels * (not self.class_agnostic), self.max_iou)
        return {
            "boxes": placement.to_frame(boxes[kept]),
            "scores": scores[kept],
            "labels": labels[kept],
        }

    def decode(self, distances: Any, cells: Any) -> Any:
        """Boxes [n, 4] of the chosen cells, in pixels of the network's input."""
        import numpy as np

        pixels = distances.astype(np.float32).T[cells] * self.strides[cells][:, None]
        centres = self.centres[cells]
        return np.concatenate([centres - pixels[:, :2], centres + pixels[:, 2:]], axis=1)


def _cells(size: Tuple[int, int], stride: int) -> Tuple[Any, Any]:
    """Centres [cells, 2] (x, y) of one level, and the stride of each."""
    import numpy as np

    columns, rows = (((np.arange(side // stride) + 0.5) * stride).astype(np.float32) for side in size)
    x, y = np.meshgrid(columns, rows)
    return np.stack([x.ravel(), y.ravel()], axis=1), np.full(x.size, stride, np.float32)


def suppress(boxes: Any, scores: Any, labels: Any, max_iou: float) -> List[int]:
    """Indices, best first, of the boxes that no better one of their class overlaps by more than ``max_iou``."""
    import numpy as np

    waiting = np.argsort(-scores, kind="stable")
    kept = []  # type: List[int]
    while len(waiting):
        best, waiting = int(waiting[0]), waiting[1:]
        kept.append(best)
        doubled = (labels[waiting] == labels[best]) & (_iou(boxes[best], boxes[waiting]) > max_iou)
        waiting = waiting[~doubled]
    return kept


def _iou(box: Any, others: Any) -> Any:
    """Intersection over union of a box with each of the others."""
    import numpy as np

    corner = np.maximum(box[:2], others[:, :2])
    shared = np.clip(np.minimum(box[2:], others[:, 2:]) - corner, 0, None).prod(axis=1)
    union = _area(box[None]) + _area(others) - shared
    return shared / np.maximum(union, 1e-6)


def _area(boxes: Any) -> Any:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)


class Masks:
    """The class of each pixel of the input: ``mask`` [height, width] of logits [1, classes, height, width]."""

    def __init__(self, declared: Dict[str, Any], size: Tuple[int, int]) -> None:
        self.output = declared["output"]
        self.size = size if declared["upsample"] else None

    def __call__(self, outputs: Arrays, placement: Placement) -> Arrays:
        import numpy as np

        logits = outputs[self.output][0].transpose(1, 2, 0)
        if self.size is not None:
            logits = resize.bilinear(logits, *self.size)
        return {"mask": logits.argmax(axis=2).astype(np.uint8)}

"""Bilinear scaling with pixel centres aligned and no smoothing, as PyTorch's ``interpolate`` does by default."""

import functools
from typing import Any


def bilinear(image: Any, width: int, height: int) -> Any:
    """An array [height, width, channels] as float32 of another size."""
    import numpy as np

    if image.shape[:2] == (height, width):
        return image.astype(np.float32)
    upper, lower, share = _places(image.shape[0], height)
    rows = _mixed(image[upper], image[lower], share[:, None, None])
    left, right, share = _places(image.shape[1], width)
    return _mixed(rows[:, left], rows[:, right], share[None, :, None])


def _mixed(first: Any, second: Any, share: Any) -> Any:
    import numpy as np

    first = first.astype(np.float32)
    return first + (second.astype(np.float32) - first) * share


@functools.lru_cache(maxsize=32)
def _places(source: int, wanted: int) -> Any:
    """For each wanted place the two source places beside it, and the share of the second."""
    import numpy as np

    places = np.clip((np.arange(wanted) + 0.5) * source / wanted - 0.5, 0, source - 1)
    first = np.floor(places).astype(np.int64)
    return first, np.minimum(first + 1, source - 1), (places - first).astype(np.float32)

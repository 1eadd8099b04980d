"""Bilinear scaling with pixel centres aligned and no smoothing, as PyTorch's ``interpolate`` does by default."""

import functools
from typing import Any


def cropped(image: Any, centre: Any, side: float, size: int) -> Any:
    """A square [size, size, channels] of an array around ``centre`` (x, y), which is reflected beyond its edges."""
    import numpy as np

    steps = (np.arange(size) + 0.5) * side / size - side / 2 - 0.5
    upper, lower, share = _between(_reflected(centre[1] + steps, image.shape[0]), image.shape[0])
    rows = _mixed(image[upper], image[lower], share[:, None, None])
    left, right, share = _between(_reflected(centre[0] + steps, image.shape[1]), image.shape[1])
    return _mixed(rows[:, left], rows[:, right], share[None, :, None])


def _reflected(places: Any, size: int) -> Any:
    """Places beyond the outer edges of the first and the last pixel, thrown back by them."""
    import numpy as np

    away = np.mod(places + 0.5, 2 * size)
    return np.minimum(away, 2 * size - away) - 0.5


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

    return _between((np.arange(wanted) + 0.5) * source / wanted - 0.5, source)


def _between(places: Any, size: int) -> Any:
    import numpy as np

    places = np.clip(places, 0, size - 1)
    first = np.floor(places).astype(np.int64)
    return first, np.minimum(first + 1, size - 1), (places - first).astype(np.float32)

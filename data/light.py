"""What light an image shows, in a word."""

from __future__ import annotations

from torch import Tensor


def light_of(image: Tensor) -> str:
    """Of an image that is normalized such that 0 is a middle grey."""
    return "dark" if float(image.mean()) < 0 else "bright"

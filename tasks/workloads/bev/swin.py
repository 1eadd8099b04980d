"""Image encoder with windowed self-attention (Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer
using Shifted Windows"), behind a convolutional stem (Xiao et al. 2021, "Early Convolutions Help Transformers See
Better") and with ReLU in the place of GELU, which an integer kernel can absorb."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from jetway.tasks.workloads.digits import ConvBlock

_MLP_RATIO = 2
# What keeps pixels apart that only the shift brought into one window. Behind a softmax the usual -100 leaves numbers
# below 1e-38, over which a CPU takes several times as long.
_APART = -50.0

Size = tuple[int, int]


class SwinEncoder(nn.Module):
    """Images [B, 3, H, W] to one feature map a stage, of strides 8, 16, …; ``window`` must divide each of them."""

    def __init__(
        self,
        image_size: Size,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window: Size,
    ) -> None:
        super().__init__()
        stem = dims[0] // 2
        self.stem = nn.Sequential(ConvBlock(3, stem, stride=2), ConvBlock(stem, stem, stride=2))
        self.stages = nn.ModuleList(
            SwinStage(inputs, dim, depth, heads, window, _halved(image_size, 3 + index))
            for index, ((inputs, dim), depth, heads) in enumerate(
                zip(pairwise((stem, *dims)), depths, num_heads, strict=True)
            )
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.stem(images)
        maps = []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        return maps


class SwinStage(nn.Module):
    """Merges 2×2 patches, then attends; every other block shifts its windows. [B, C, H, W] in and out."""

    def __init__(self, inputs: int, dim: int, depth: int, num_heads: int, window: Size, size: Size) -> None:
        super().__init__()
        self.merge = nn.Conv2d(inputs, dim, kernel_size=2, stride=2)
        self.blocks = nn.Sequential(
            *(SwinBlock(dim, num_heads, window, size, shifted=bool(index % 2)) for index in range(depth))
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.merge(features).permute(0, 2, 3, 1)
        attended: Tensor = self.norm(self.blocks(tokens))
        return attended.permute(0, 3, 1, 2)


class SwinBlock(nn.Module):
    """Attention within windows, then a perceptron at each pixel, each around a skip. [B, H, W, C] in and out."""

    def __init__(self, dim: int, num_heads: int, window: Size, size: Size, *, shifted: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.windows = Windows(window, size, shifted=shifted and window != size)
        self.attention = WindowAttention(dim, num_heads, window)
        self.mlp = nn.Sequential(
            nn.Linear(dim, _MLP_RATIO * dim), nn.ReLU(), nn.Linear(_MLP_RATIO * dim, dim)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        windows = self.windows.split(self.norm1(tokens))
        tokens = tokens + self.windows.join(self.attention(windows, self.windows.mask))
        mixed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return mixed


class Windows(nn.Module):
    """How a map of ``size`` is cut into windows, shifted by half a window or not."""

    mask: Tensor | None

    def __init__(self, window: Size, size: Size, *, shifted: bool) -> None:
        super().__init__()
        if size[0] % window[0] or size[1] % window[1]:
            raise ValueError(
                f"windows of {window[0]}x{window[1]} do not divide a feature map of {size[0]}x{size[1]}: its sides are "
                "the image's divided by the stage's stride, 8, 16, ...; choose another window or image_size"
            )
        self.window, self.size = window, size
        self.grid = (size[0] // window[0], size[1] // window[1])
        self.shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
        self.register_buffer("mask", self._mask() if shifted else None, persistent=False)

    def split(self, tokens: Tensor) -> Tensor:
        """[B, H, W, C] to [B × windows, tokens of a window, C]."""
        if any(self.shift):
            tokens = tokens.roll((-self.shift[0], -self.shift[1]), (1, 2))
        (rows, columns), (height, width) = self.grid, self.window
        tokens = tokens.reshape(-1, rows, height, columns, width, tokens.shape[-1])
        return tokens.transpose(2, 3).reshape(-1, height * width, tokens.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """[B × windows, tokens of a window, C] to [B, H, W, C]."""
        (rows, columns), (height, width) = self.grid, self.window
        tokens = windows.reshape(-1, rows, columns, height, width, windows.shape[-1])
        tokens = tokens.transpose(2, 3).reshape(-1, *self.size, windows.shape[-1])
        return tokens.roll(self.shift, (1, 2)) if any(self.shift) else tokens

    def _mask(self) -> Tensor:
        """What is added to the attention between two tokens of a window, [windows, 1, tokens, tokens]."""
        regions = torch.zeros(self.size)
        regions[-self.shift[0] :] += 1
        regions[:, -self.shift[1] :] += 2
        height, width = self.window
        cut = (
            regions.reshape(self.grid[0], height, self.grid[1], width)
            .transpose(1, 2)
            .flatten(2)
            .flatten(0, 1)
        )
        return torch.where(cut[:, None] == cut[:, :, None], 0.0, _APART)[:, None]


class WindowAttention(nn.Module):
    """Multi-head self-attention among the tokens of a window, with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: Size) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        positions = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(positions, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _relative_positions(window), persistent=False)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Windows [B, T, C] to the same shape; ``mask`` [windows of an image, 1, T, T] is added to the attention."""
        length, width = windows.shape[1], self.qkv.out_features // 3
        parts = self.qkv(windows).reshape(-1, length, 3 * self.num_heads, width // self.num_heads)
        query, key, value = parts.transpose(1, 2).split(self.num_heads, dim=1)
        scale = (width // self.num_heads) ** -0.5
        weights = query @ key.transpose(-2, -1) * scale + self._bias(length)
        if mask is not None:
            shape = (self.num_heads, length, length)
            weights = (weights.reshape(-1, mask.shape[0], *shape) + mask).reshape(-1, *shape)
        mixed = weights.softmax(dim=-1) @ value
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(-1, length, width))
        return projected

    def _bias(self, length: int) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index]
        return bias.reshape(length, length, -1).permute(2, 0, 1)


def _relative_positions(window: Size) -> Tensor:
    """Index into the table for each pair of tokens, flat."""
    rows, columns = (torch.arange(side) for side in window)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)
    steps = places[:, :, None] - places[:, None, :]
    down, right = steps[0] + window[0] - 1, steps[1] + window[1] - 1
    return (down * (2 * window[1] - 1) + right).flatten()


def _halved(size: Size, times: int) -> Size:
    return size[0] >> times, size[1] >> times

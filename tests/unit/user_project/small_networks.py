"""Small networks of every kind that pruning must handle, and a workload for them: what a user would bring."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from jetway.tasks.metrics import Metric
from jetway.tasks.workload import Workload


class Residual(nn.Module):
    """Residual add around a depthwise bottleneck, BatchNorm, flatten."""

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32))
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32))
        self.project = nn.Conv2d(32, 16, 1)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(64, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return self.classifier(self.dropout(F.adaptive_avg_pool2d(x, 2).flatten(1)))


class Grouped(nn.Module):
    """Grouped convolution, GroupNorm, concatenation, transposed convolution, PReLU."""

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(8, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.act = nn.PReLU(16)
        self.head = nn.Conv2d(48, 5, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.act(self.up(F.relu(self.norm(self.grouped(x)))))
        return self.head(torch.cat([F.interpolate(x, scale_factor=2.0), y], dim=1)).mean(dim=(2, 3))


class Attention(nn.Module):
    """Attention written by hand, with the attributes that such modules keep."""

    def __init__(self, width, num_heads, kind):
        super().__init__()
        self.num_heads, self.head_dim, self.kind = num_heads, width // num_heads, kind
        self.scale = self.head_dim**-0.5
        if kind == "separate":
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def heads_of(self, x):
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x):
        n, tokens, _ = x.shape
        if self.kind == "separate":
            q, k, v = (self.heads_of(layer(x)) for layer in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            return self.proj(out.transpose(1, 2).reshape(n, tokens, -1))
        if self.kind == "chunk":
            q, k, v = (self.heads_of(part) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n, tokens, -1))


class Vit(nn.Module):
    """Vision transformer: tokens, position embedding, LayerNorm, custom attention, MLP."""

    shape = (3, 8, 8)
    kind = "fused"

    def __init__(self, width=32, num_heads=4):
        super().__init__()
        self.hidden_dim = width
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, self.kind)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patch(x).reshape(x.shape[0], self.hidden_dim, -1).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class VitChunk(Vit):
    kind = "chunk"


class VitSeparate(Vit):
    kind = "separate"


class WindowAttention(nn.Module):
    """Attention within windows, with a table of relative positions that has a column for each head."""

    def __init__(self, width, num_heads, window):
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        span = 2 * window - 1
        self.relative_position_bias_table = nn.Parameter(torch.randn(span**2, num_heads))
        row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        rows, columns = (axis.flatten()[:, None] - axis.flatten() + window - 1 for axis in (row, column))
        self.register_buffer("relative_position_index", rows * span + columns)

    def forward(self, x):
        n, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(tokens, tokens, -1).permute(2, 0, 1)
        attention = (q @ k.transpose(-2, -1) * self.scale + bias[None]).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(n, tokens, -1))


class FunctionalAttention(nn.Module):
    """Hands its layers' weights to a function, so that the layers themselves are never called."""

    def __init__(self, width, num_heads, window):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return attend(x, self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias, self.num_heads)


def attend(x, qkv_weight, qkv_bias, weight, bias, num_heads):
    n, tokens, _ = x.shape
    q, k, v = F.linear(x, qkv_weight, qkv_bias).reshape(n, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.linear(out.transpose(1, 2).reshape(n, tokens, -1), weight, bias)


class WindowBlock(nn.Module):
    def __init__(self, width, num_heads, window, shift, attention):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attention(width, num_heads, window)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        n, height, width, _ = x.shape
        grid = (height // self.window, width // self.window)
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(n, grid[0], self.window, grid[1], self.window, -1).permute(0, 1, 3, 2, 4, 5)
        y = self.attn(y.reshape(n * grid[0] * grid[1], self.window**2, -1))
        y = (
            y.view(n, *grid, self.window, self.window, -1)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(n, height, width, -1)
        )
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Transformer with shifted windows, after Liu et al. 2021, without its masks."""

    shape = (3, 8, 8)
    attention = WindowAttention

    def __init__(self, width=32, num_heads=8, window=2, depth=4):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.ModuleList(
            WindowBlock(width, num_heads, window, i % 2, self.attention) for i in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.patch(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=(1, 2)))


class SwinFunctional(Swin):
    attention = FunctionalAttention


class Merging(nn.Module):
    """Channels last, and four neighbours joined into one place, as between the stages of a Swin transformer."""

    shape = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.first, self.second = self.block(32), self.block(64)
        self.norm, self.reduction = nn.LayerNorm(128), nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 5)

    @staticmethod
    def block(width):
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = self.patch(x).permute(0, 2, 3, 1)
        x = x + self.first(x)
        corners = [x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
        x = self.reduction(self.norm(torch.cat(corners, -1)))
        x = (x + self.second(x)).permute(0, 3, 1, 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Masked(nn.Module):
    """Blocks that are given a mask too, so that nothing simpler than their list can do without one."""

    shape = (6, 16)

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(16, 32), nn.Linear(32, 5)
        self.blocks = nn.ModuleList(MaskedBlock() for _ in range(3))

    def forward(self, x):
        x, mask = self.embed(x), (x.mean(dim=2, keepdim=True) > 0).float()
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(dim=1))


class MaskedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, mask):
        return x + mask * self.down(F.relu(self.up(x)))


class Multihead(nn.Module):
    """PyTorch's own attention module."""

    shape = (6, 16)

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        x = self.norm(x + self.attn(x, x, x, need_weights=False)[0])
        return self.head((x + self.down(F.relu(self.up(x)))).mean(dim=1))


class Tokens(nn.Module):
    """Integer inputs, an embedding, a recurrent layer, a buffer that no state dict holds."""

    shape = (6,)
    vocabulary = 20

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.widen = nn.Linear(16, 32)
        self.recurrent = nn.LSTM(32, 16, batch_first=True)
        self.head = nn.Linear(16, 5)
        self.register_buffer("gain", torch.full((1,), 0.5), persistent=False)

    def forward(self, x):
        x = F.relu(self.widen(self.embed(x)))
        return self.head(self.recurrent(x * self.gain)[0][:, -1])


class FixedWidth(nn.Module):
    """Counts on 64 features: it cannot be pruned as it is."""

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.body(x))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x):
        return F.adaptive_avg_pool2d(self.conv(x), 2).view(-1, 64)


class OtherAttention(nn.Module):
    """Attention whose projections have names of their own; the network knows the number of heads too."""

    shape = (6, 16)

    def __init__(self, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.embed = nn.Linear(16, 32)
        self.attn = Mixing(32, num_heads)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attn(x)
        return self.head((x + self.down(F.relu(self.up(x)))).mean(dim=1))


class Mixing(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.asked, self.known, self.said, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        parts = [
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.asked, self.known, self.said)
        ]
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Shuffled(nn.Module):
    """Reorders halves of joined sequences: their channels cannot be followed."""

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 16, 1)
        self.norm, self.mix, self.head = nn.BatchNorm1d(32), nn.Conv1d(32, 16, 1), nn.Conv1d(16, 5, 1)

    def forward(self, x):
        x = F.relu(self.stem(x.flatten(2)))
        first, second = self.norm(torch.cat([x, self.conv(x)], dim=1)).chunk(2, dim=1)
        return self.head(self.mix(torch.cat([second, first], dim=1))).mean(dim=2)


class Untraceable(nn.Module):
    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        with torch.no_grad():
            return self.conv(x).mean(dim=(2, 3))


class Blobs(Dataset):
    """Noise around a mean of its class, so that there is something to learn."""

    def __init__(self, network, count, seed, augmented=False):
        self.augmented = augmented
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 5, (count,), generator=generator)
        shift = self.labels.view(-1, *[1] * len(network.shape))
        if hasattr(network, "vocabulary"):
            self.inputs = torch.randint(0, 16, (count, *network.shape), generator=generator) % (shift + 3)
        else:
            self.inputs = torch.randn(count, *network.shape, generator=generator) + 0.4 * shift

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        noise = torch.rand(1) if self.augmented else 0
        return {"x": self.inputs[index] + noise}, int(self.labels[index])


class SmallWorkload(Workload):
    output_names = ("logits",)
    metrics = (Metric(name="top1"),)

    def __init__(self, network="Residual", samples=60, augmented=False):
        self.network_class, self.samples, self.augmented = globals()[network], samples, augmented

    def network(self):
        return self.network_class()

    def example_inputs(self):
        return {"x": self.evaluation_data()[0][0]["x"][None]}

    def train_data(self):
        return Blobs(self.network_class, self.samples, seed=1, augmented=self.augmented)

    def calibration_data(self):
        return Blobs(self.network_class, 16, seed=2)

    def evaluation_data(self):
        return Blobs(self.network_class, 40, seed=3)

    def loss(self, outputs, target):
        return F.cross_entropy(outputs["logits"], target)

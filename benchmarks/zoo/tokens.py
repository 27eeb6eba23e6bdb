"""Nets of strangers that work on tokens: vision transformers in plain code, and an MLP-Mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QkvAttention(nn.Module):
    """Self-attention with one Linear for queries, keys and values, as timm writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        weights = (query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(n, length, width))


class Multihead(nn.Module):
    """Self-attention by torch's own module."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class Layer(nn.Module):
    """A pre-norm layer of a transformer."""

    def __init__(self, width: int, heads: int, attention: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Multihead(width, heads) if attention == "mha" else QkvAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A tiny vision transformer; its patches come from a convolution (mha) or a Linear (qkv)."""

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        *,
        attention: str = "mha",
        patch: int = 4,
        width: int = 48,
        depth: int = 3,
        heads: int = 3,
    ) -> None:
        super().__init__()
        self.patch = patch
        tokens = (side // patch) ** 2
        self.embed = (
            nn.Conv2d(channels, width, patch, patch)
            if attention == "mha"
            else nn.Linear(channels * patch * patch, width)
        )
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, tokens + 1, width))
        self.layers = nn.Sequential(*(Layer(width, heads, attention) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.5) / 0.5
        if isinstance(self.embed, nn.Conv2d):
            x = self.embed(x).flatten(2).transpose(1, 2)
        else:
            x = self.embed(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layers(x))[:, 0])


class Mixing(nn.Module):
    """A layer of an MLP-Mixer: over the tokens, then over the channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.across = nn.Sequential(
            nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)
        )
        self.norm2 = nn.LayerNorm(width)
        self.along = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm2(x))


class Mixer(nn.Module):
    """A small MLP-Mixer (Tolstikhin et al. 2021)."""

    def __init__(
        self, channels: int, side: int, classes: int, *, patch: int = 4, width: int = 48, depth: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, patch, patch)
        self.layers = nn.Sequential(*(Mixing((side // patch) ** 2, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x * 2 - 1).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(x)).mean(1))

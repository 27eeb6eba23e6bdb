"""torch's attention with its output projection called as a module, so that hooks see what passes.

`nn.MultiheadAttention` hands the weights of `out_proj` to a function and never calls the module: a mask
on its heads would have no place to stand. `CalledAttention` answers the same from the same parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CalledAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` that calls `out_proj` on the heads' outputs, (L, N, E) or (N, L, E).

    With attention masks it falls back to torch's own forward, and `out_proj` is not called.
    """

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> CalledAttention:
        """A twin that shares parameters and submodules with `attention`."""
        twin = copy.copy(attention)
        twin.__dict__ = dict(attention.__dict__)
        twin.__class__ = cls
        assert isinstance(twin, cls)
        return twin

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if key_padding_mask is not None or attn_mask is not None or query.dim() != 3:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        q, k, v = self._heads(query, key, value)  # (N, heads, L, E / heads) each
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
            weights = scores.softmax(-1)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        batch, _, length, _ = out.shape
        out = out.permute(2, 0, 1, 3).reshape(length * batch, self.embed_dim)
        out = out.view(length, batch, self.embed_dim)
        out = self.out_proj(out.transpose(0, 1) if self.batch_first else out)
        return out, weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The three projections, cut into heads."""
        if query is key and key is value:
            both = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            projected = list(both.unflatten(-1, (3, self.embed_dim)).unbind(-2))
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
            given = (query, key, value)
            projected = [F.linear(x, w, b) for x, w, b in zip(given, weights, biases, strict=True)]
        cut = [x.unflatten(-1, (self.num_heads, -1)) for x in projected]
        return [x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3) for x in cut]


def can_be_called(module: nn.Module) -> bool:
    """Whether `CalledAttention` can take the place of this module."""
    return (
        type(module) is nn.MultiheadAttention
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


def call_projections(model: nn.Module) -> dict[str, nn.Module]:
    """Put `CalledAttention` in the place of every attention of torch's in `model`; the originals by
    name.

    Where an encoder layer would take torch's fused path around its submodules, it takes the plain one:
    hooks on its attention or linear layers see to that.
    """
    replaced: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and can_be_called(module):
            assert isinstance(module, nn.MultiheadAttention)
            replaced[name] = module
            model.set_submodule(name, CalledAttention.of(module))
    return replaced


@contextmanager
def called_projections(model: nn.Module) -> Iterator[None]:
    """`call_projections` while the context is open; torch's fused path is off in it."""
    fused = torch.backends.mha.get_fastpath_enabled()
    replaced = call_projections(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for name, module in replaced.items():
            model.set_submodule(name, module)

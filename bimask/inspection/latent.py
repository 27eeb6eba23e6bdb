"""How far the clean images are from each class in the space before the last layer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float64]


def latent_distances(model: nn.Module, images: Tensor) -> Tensor | None:
    """Minimal universal latent perturbation of every class (arXiv 2511.08944).

        d_k = min |s|_2   subject to   argmax W (z_i + s) + b = k   for all images i

    where z_i is the input of the last layer W, b. The constraints of one rival j differ in their right
    hand side alone, so the hardest image of each is enough: A s >= c of K - 1 rows, a least distance
    problem, solved exactly by nonnegative least squares (Lawson and Hanson 1974, chapter 23). A
    backdoor leaves its class anomalously near. Distances are divided by the median distance of the z_i
    from their mean, so they have no unit.

    Args:
        model: images -> logits (N, K), in eval mode, whose last step is an nn.Linear, or a log-softmax
            after it.
        images: (N, C, H, W) in [0, 1], clean, at least two that differ.

    Returns:
        (K,) float64 on the CPU; inf where no perturbation does it. None where the logits are not the
        output of an nn.Linear.
    """
    last = last_layer(model, images)
    if last is None:
        return None
    layer, features = last
    z = features.double().cpu().numpy()
    weights = layer.weight.detach().double().cpu().numpy()
    bias = np.zeros(len(weights))
    if layer.bias is not None:
        bias = layer.bias.detach().double().cpu().numpy()
    spread = np.median(np.linalg.norm(z - z.mean(0), axis=1))
    distances = []
    for k in range(len(weights)):
        rivals = np.arange(len(weights)) != k
        normals = weights[k] - weights[rivals]
        needed = (bias[rivals] - bias[k] - z @ normals.T).max(0)
        distances.append(least_distance(normals, needed) / spread)
    return torch.tensor(distances, dtype=torch.float64)


def least_distance(normals: Floats, needed: Floats) -> float:
    """min |s| subject to normals @ s >= needed, by nonnegative least squares; inf if nothing does.

    Args:
        normals: (M, D).
        needed: (M,).
    """
    if (needed <= 0).all():
        return 0.0
    from scipy.optimize import nnls  # half a second, which most programs need not spend

    stacked = np.vstack([normals.T, needed])  # (D + 1, M)
    wanted = np.zeros(len(stacked))
    wanted[-1] = 1
    weights, residual = nnls(stacked, wanted)
    if residual < 1e-9:
        return float("inf")
    rest = stacked @ weights - wanted
    return float(np.linalg.norm(rest[:-1] / rest[-1]))


def last_layer(model: nn.Module, images: Tensor) -> tuple[nn.Linear, Tensor] | None:
    """The linear layer that the logits come from, and what goes into it, (N, D); None where they come
    from none. A constant of a row, such as a log-softmax takes off, changes no answer."""
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            seen.append((module, inputs[0], output))

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    for layer, features, output in reversed(seen):
        if output.shape == logits.shape and _same_but_for_constants(output, logits):
            return layer, features
    return None


def _same_but_for_constants(output: Tensor, logits: Tensor) -> bool:
    """Whether two sets of rows (N, K) differ by a number a row alone."""
    apart = output - logits
    apart = apart - apart.mean(1, keepdim=True)
    return bool(apart.abs().max() <= 1e-4 * logits.abs().max().clamp_min(1))

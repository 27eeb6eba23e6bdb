"""Rounds timed, launches counted, memory followed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.naive import Naive
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.population import PopulationPurifier

VIEWS = {  # these launch nothing
    f"aten::{name}"
    for name in (
        *("alias", "as_strided", "broadcast_to", "chunk", "detach", "expand", "expand_as", "flatten"),
        *("narrow", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze"),
        *("t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as", "contiguous", "to"),
        *("empty", "empty_like", "empty_strided", "lift_fresh", "result_type", "resolve_conj"),
        *("resolve_neg", "item", "_local_scalar_dense", "is_nonzero", "set_"),
    )
}


def round_seconds(model: nn.Module, images: Tensor, config: PurifyConfig) -> tuple[list[float], Tensor]:
    """Seconds of every round but the first, and the mask variables at the end."""
    marks: list[float] = []

    def mark(_member: int, _log: Any, _masks: Any) -> None:
        marks.append(time.perf_counter())

    (result,) = PopulationPurifier(model, images, [config], on_round=mark).run()
    if isinstance(result, Exception):
        raise result
    rounds = [b - a for a, b in itertools.pairwise(marks)]
    return rounds, torch.stack([result.masks.mask, result.masks.selection]).detach()


def naive_round_seconds(
    model: nn.Module, images: Tensor, config: PurifyConfig, *, fine: bool = False
) -> tuple[list[float], Tensor]:
    """The same of the plain program."""
    marks: list[float] = []
    naive = Naive(model, images, config, fine=fine)
    masks = naive.run(lambda *_: marks.append(time.perf_counter()))
    rounds = [b - a for a, b in itertools.pairwise(marks)]
    return rounds, torch.stack([masks.mask, masks.selection]).detach()


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def alternating(repeats: int, **programs: Callable[[], float]) -> dict[str, list[float]]:
    """Every program once, then every program again, ...: drift of the machine hits all alike."""
    seen: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            seen[name].append(program())
    return seen


# What an operator does, by words in its name; the first that fits.
KINDS = {
    "convolution": ("conv",),
    "matrices": ("mm", "linear", "matmul", "dot"),
    "copies": ("copy", "cat", "stack", "clone", "fill", "zero", "index"),
}
OTHER, BETWEEN = "other operators", "Python and dispatch"


def shares(program: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a program by what its operators do, and what is between them; of one thread.

    The profiler itself lengthens what is between.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begun = time.perf_counter()
        program()
        wall = time.perf_counter() - begun
    spent = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            kinds = (kind for kind, words in KINDS.items() if any(word in event.key for word in words))
            spent[next(kinds, OTHER)] += event.self_cpu_time_total / 1e6
    return {**spent, BETWEEN: max(0.0, wall - sum(spent.values())), "seconds": wall}


def launches(program: Callable[[], Any]) -> int:
    """Leaf operators that compute something: what would be kernel launches on a GPU."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        program()
    return sum(
        1
        for event in profiler.events()
        if event.name.startswith("aten::") and event.name not in VIEWS and not event.cpu_children
    )


def peak_bytes(program: Callable[[], Any]) -> int:
    """The most bytes of tensors that `program` holds at once, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        program()
    results = profiler.profiler.kineto_results
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak

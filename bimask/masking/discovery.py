"""Which sites a model has: found by asking it a few images and watching which layers answer.

A layer that is never called (its weights are read by a function instead) has no site, nor has one whose
output holds no image (a table of positions), nor the last layer, whose outputs are the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bimask.errors import MaskMismatchError
from bimask.masking.attention import called_projections
from bimask.masking.masks import MaskSet, fold, masked_forward
from bimask.masking.sites import (
    FEATURES,
    HEADS,
    KINDS,
    Kind,
    Site,
    axis_of,
    channels_of,
    foldable,
    is_block,
    kind_of,
    sites_of,
)

Which = Literal["published", "all"] | tuple[str, ...]
ALL: tuple[Kind, ...] = ("conv", "linear", "heads", "features", "embedding", "norm")
# Names of layers that make queries, keys and values, and of the number of heads beside them.
PROJECTIONS = frozenset(
    {"q", "k", "v", "kv", "qkv", "in_proj", "c_attn", "query", "key", "value", "query_key_value"}
    | {f"{name}_proj" for name in ("q", "k", "v", "qkv")}
    | {f"to_{name}" for name in ("q", "k", "v", "kv", "qkv")}
    | {f"w_{name}" for name in ("q", "k", "v")}
)
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
SAME = 1e-4  # of the largest number: what rounding in another order may change
FOLDED = 1e-5  # what folding may change of a row of logits, as a share of its largest, in float32
FOLDED_DOUBLE = 1e-12


@dataclass
class _Seen:
    """What one layer showed in a pass.

    Attributes:
        outputs, inputs: of every call; the first tensor of each.
    """

    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, _Seen]]:
    """What these modules are given and answer while the context is open, in the order of first
    calls."""
    seen: dict[str, _Seen] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor) and inputs and isinstance(inputs[0], Tensor):
                found = seen.setdefault(name, _Seen())
                found.outputs.append(first.detach())
                found.inputs.append(inputs[0].detach())

        return hook

    with ExitStack() as undo:
        undo.enter_context(called_projections(model))
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(watch(name))
            undo.callback(handle.remove)
        yield seen


@torch.no_grad()
def images_in(model: nn.Module, sites: Iterable[Site], images: Tensor) -> dict[str, int]:
    """Site's key -> the dimension of its values that counts images; without those that hold no image in
    one of their module's calls.

    Found by asking two images, then three: that dimension is the one that grows with them.

    Args:
        model: images -> logits, in eval mode.
        images: (N, C, H, W), N >= 1.
    """
    sites = list(sites)
    names = list(dict.fromkeys(site.module for site in sites))
    asked: list[dict[str, _Seen]] = []
    for count in (2, 3):
        with watched(model, names) as seen:
            model(torch.cat([images] * count)[:count])
        asked.append(seen)
    found = {}
    for site in sites:
        two, three = (_values(seen, site) for seen in asked)
        if two and len(two) == len(three):
            pairs = [(a.shape, b.shape) for a, b in zip(two, three, strict=True)]
            grows = [d for d in (0, 1) if all(_grows(a, b, d) for a, b in pairs)]
            if grows:
                found[site.key] = grows[0]
    return found


def _values(seen: dict[str, _Seen], site: Site) -> list[Tensor]:
    """What a site would scale, of every call."""
    layer = seen.get(site.module, _Seen())
    return layer.inputs if site.on_input else layer.outputs


def _grows(two: torch.Size, three: torch.Size, at: int) -> bool:
    """Whether a dimension goes from a multiple of 2 to that of 3, and no other changes."""
    if len(two) != len(three) or at >= len(two) - 1:
        return False
    others = [d for d in range(len(two)) if d != at]
    return 3 * two[at] == 2 * three[at] and all(two[d] == three[d] for d in others)


@torch.no_grad()
def candidates(model: nn.Module, images: Tensor) -> list[Site]:
    """Every site that a model has but its last layer, in the order in which the layers are called.

    Args:
        model: images -> logits (N, K), in eval mode; left as it is.
        images: (N, C, H, W), N >= 1, clean.
    """
    modules = dict(model.named_modules())
    sizes = {name: channels_of(module) for name, module in modules.items() if name}
    names = [name for name, size in sizes.items() if size is not None]
    with watched(model, names) as seen:
        logits = model(images[:2])
    layers = [name for name in seen if not is_block(modules[name])]
    last = _last(layers, sizes, logits.shape[1])
    found: list[Site] = []
    before: set[int] = set()  # widths of the layers so far: inputs of such a width are masked already
    attending: int | None = None  # heads of the attention whose output layer comes next
    for name in seen:
        module, size = modules[name], sizes[name]
        assert size is not None
        kind = _kind(modules, name)
        if kind == "projection":
            attending = _heads(modules, name)
        elif kind == "linear" or name in last:
            width = seen[name].inputs[0].shape[-1]
            mine = attending
            if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
                mine = _heads(modules, name)
            if mine is not None and width % mine == 0 and width > mine and name not in last:
                found.append(Site(name + HEADS, name, "heads", mine))
            elif seen[name].inputs[0].ndim == 2 and width not in before:
                found.append(Site(name + FEATURES, name, "features", width))
            attending = None
        before.add(size)
        if name not in last and seen[name].outputs[0].shape[axis_of(module)] == size:
            found.append(Site(name, name, kind, size))
    where = images_in(model, found, images)
    holding = [site for site in found if site.key in where]
    mixing = _mixing(model, holding, where, images)
    return [site for site in holding if site.key not in mixing]


@torch.no_grad()
def _mixing(model: nn.Module, sites: Sequence[Site], where: dict[str, int], images: Tensor) -> set[str]:
    """Keys of the sites whose values of an image depend on its neighbour: asked with another, and with
    itself. Not alone, where a `squeeze` takes the dimension of images away."""
    pair = torch.cat([images[:1], images[-1:].flip(3)])
    names = list(dict.fromkeys(site.module for site in sites))
    with watched(model, names) as together:
        model(pair)
    with watched(model, names) as twice:
        model(pair[[0, 0]])

    mixing = set()
    for site in sites:
        at = where[site.key]
        for both, same in zip(_values(together, site), _values(twice, site), strict=True):
            one, other = (value.narrow(at, 0, value.shape[at] // 2) for value in (both, same))
            if (one - other).abs().max() > SAME * other.abs().max().clamp_min(1e-6):
                mixing.add(site.key)
    return mixing


def _kind(modules: dict[str, nn.Module], name: str) -> Kind:
    kind = kind_of(modules[name])
    if kind == "linear" and name.rpartition(".")[2].lower() in PROJECTIONS:
        return "projection"
    return kind


def _heads(modules: dict[str, nn.Module], name: str) -> int | None:
    """How many heads the attention has whose own layer `name` is; None where that is not said."""
    parent = modules[name.rpartition(".")[0]]
    for attribute in HEAD_COUNTS:
        count = getattr(parent, attribute, None)
        if isinstance(count, int) and count > 0:
            return count
    return None


def _last(names: Sequence[str], sizes: dict[str, int | None], classes: int) -> set[str]:
    """The layers that logits come from: the last ones called that have as many outputs."""
    last: set[str] = set()
    for name in reversed(names):
        if sizes[name] != classes:
            break
        last.add(name)
    return last


def chosen(model: nn.Module, images: Tensor, which: Which) -> list[Site]:
    """The sites that a setting names.

    Args:
        which: "published" (convolutions; or encoder blocks, where there are any), "all" (every kind of
            `ALL`), or kinds and names of sites, which may hold `*`.

    Raises:
        MaskMismatchError: a name that no site has, with those that are near; nothing to mask.
    """
    if which == "published":
        return _published(model, images)
    found = candidates(model, images)
    if which == "all":
        return [site for site in found if site.kind in ALL]
    wanted: dict[str, None] = {}
    for pattern in which:
        named = [
            site.key
            for site in found
            if (site.kind == pattern if pattern in KINDS else fnmatchcase(site.key, pattern))
        ]
        if not named:
            raise MaskMismatchError(_no_such(pattern, found))
        wanted |= dict.fromkeys(named)
    return [site for site in found if site.key in wanted]


@torch.no_grad()
def _published(model: nn.Module, images: Tensor) -> list[Site]:
    """The published sites that answer each image, a last convolution too, in module order."""
    modules = dict(model.named_modules())
    sites = [Site(key, key, _kind(modules, key), size) for key, size in sites_of(model).items()]
    where = images_in(model, sites, images)
    holding = [site for site in sites if site.key in where]
    mixing = _mixing(model, holding, where, images)
    return [site for site in holding if site.key not in mixing]


def _no_such(pattern: str, found: Sequence[Site]) -> str:
    near = get_close_matches(pattern, [*KINDS, *(site.key for site in found)], n=3, cutoff=0.5)
    kinds = sorted({site.kind for site in found})
    hint = f"did you mean {' or '.join(near)}?" if near else "`python -m bimask sites` lists them."
    has = f"it has {len(found)} of kind {', '.join(kinds)}"
    return f"No site of the model is named {pattern!r}; {has}; {hint}"


def masks_for(model: nn.Module, images: Tensor, which: Which = "published") -> MaskSet:
    """Masks at the identity for the sites that a setting names, checked on images: with random factors
    the folded model answers as the masked one, or the site is given a gate.

    Args:
        model: images -> logits (N, K), in eval mode; left as it is.
        images: (N, C, H, W), of the model's dtype and device.

    Raises:
        MaskMismatchError: nothing to mask, or a site that neither weights nor a gate can mask.
    """
    sites = chosen(model, images, which)
    sizes = {site.key: site.channels for site in sites}
    masks = MaskSet(sizes).like(model)
    sample = images[:4]
    unfit = [] if _folds(model, masks, sample) else _unfit(model, sites, sample)
    if unfit:
        masks = MaskSet(sizes, gates=unfit).like(model)
        if not _folds(model, masks, sample):
            raise MaskMismatchError(
                f"Folded into the weights, or as gates, the masks of {', '.join(unfit[:3])} answer "
                "otherwise than on the layers' outputs: the model reads these layers' weights besides "
                "calling them; name other `sites`."
            )
    return masks


def _unfit(model: nn.Module, sites: Sequence[Site], sample: Tensor) -> list[str]:
    """Keys of the sites whose factor is no factor on weights, each tried alone."""
    folds = foldable(model, sites)
    unfit = []
    for site in sites:
        if site.key in folds:
            alone = MaskSet({site.key: site.channels}).like(model)
            if not _folds(model, alone, sample):
                unfit.append(site.key)
    return unfit


@torch.no_grad()
def _folds(model: nn.Module, masks: MaskSet, sample: Tensor) -> bool:
    """Whether masks with random factors answer the same folded and as hooks."""
    tried = copy.deepcopy(masks)
    generator = torch.Generator().manual_seed(0)
    for values, low in ((tried.mask, 0.35), (tried.selection, 0.2)):
        drawn = torch.rand(len(values), generator=generator) * 0.5 + low
        values.copy_(drawn.to(values))
    expected = masked_forward(model, tried, sample)
    return same_rows(fold(model, tried)(sample), expected)


def same_rows(got: Tensor, expected: Tensor) -> bool:
    """Whether logits (N, K) differ by rounding alone."""
    bound = FOLDED_DOUBLE if expected.dtype == torch.float64 else FOLDED
    return bool(((got - expected).abs() <= bound * row_scale(expected)).all())


def row_scale(logits: Tensor) -> Tensor:
    """What the rounding of logits (N, K) is measured by: the largest of each row, or 1, (N, 1)."""
    return logits.abs().amax(1, keepdim=True).clamp_min(1)

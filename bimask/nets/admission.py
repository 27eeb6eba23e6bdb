"""The door: is this a model that can be defended, and how is it asked?

Before anything is learned, a model answers a few images in several ways. What it does otherwise than a
plain `images in [0, 1] -> logits (N, K)` is either undone by a `Door` in front of a copy of it, and
told, or refused in one sentence with what to do:

    answers      a tensor; of a tuple, a dict or an object, the logits are taken; probabilities are
                 undone
    images       each is answered by itself, the same twice, in any order and company
    input        is left as it was, else the model is given a clone; any memory layout
    weights      in half precision are computed with in single precision
    gradients    reach the images

A door is two hooks on the copy's root, so that modules and tensors keep their names.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from bimask.errors import BimaskError, ModelError, NonFiniteError
from bimask.masking.copies import copied
from bimask.masking.discovery import SAME, watched
from bimask.nets.answers import taken, where_logits
from bimask.nets.door import Door, Undo

ASKED = 8  # images at most
HALF = (torch.float16, torch.bfloat16)
CLOSING = (nn.Softmax, nn.Softmax2d, nn.Sigmoid)  # a log-softmax is harmless
HERE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Admitted:
    """A model that was let in.

    Attributes:
        plain: the user's model itself, out of wrappers (torch.compile, DataParallel); left as it is. A
            copy where it holds computed tensors, as a pruned model does.
        model: a copy, in eval mode, images in [0, 1] -> logits (N, K).
        door: what stands in front of the copy.
        findings: one sentence for each thing that was done about it.
    """

    plain: nn.Module
    model: nn.Module
    door: Door
    findings: tuple[str, ...]


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A model out of torch.compile and of the wrappers of parallel training, and what was taken off.

    Raises:
        ModelError: a TorchScript module or no module at all, with no layers to mask.
    """
    said: list[str] = []
    while True:
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"The model is a {type(model).__name__}, whose layers cannot be masked; give the "
                "`torch.nn.Module`, with its weights loaded."
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise ModelError(
                "The model is a TorchScript module, whose layers cannot be masked; give the Python "
                "module that it was made from, with the same weights."
            )
        inner = model._modules.get("_orig_mod")
        name = "torch.compile"
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner, name = model.module, type(model).__name__
        if inner is None:
            return model, said
        model = inner
        said.append(f"The model was taken out of {name}; the result is the plain module.")


def admit(model: nn.Module, images: Tensor) -> Admitted:
    """Look at a model before it is defended, in a few passes of at most eight images.

    Args:
        model: the user's, of any mode; it is copied and left as it is.
        images: (N, C, H, W) float in [0, 1], N >= 1, clean, on the model's device.

    Raises:
        ModelError: it cannot be asked or gives no logits, with the sentence that says what to do.
        NonFiniteError: its logits are NaN or infinite.
    """
    plain, findings = unwrapped(model)
    try:
        asked = copied(plain).eval()
    except Exception as error:  # whatever a user's attributes raise
        raise ModelError(
            f"The model cannot be copied ({_first(error)}); give one whose attributes `copy.deepcopy` "
            "takes."
        ) from error
    if any(value.dtype in HALF for value in asked.parameters()):
        asked = asked.float()
        findings.append("The weights are in half precision; the defence computes in single precision.")
    parameter = next((p for p in asked.parameters() if p.is_floating_point()), None)
    sample = images[:ASKED].to(images if parameter is None else parameter.dtype)
    sample = sample.clone(memory_format=torch.contiguous_format)
    if parameter is not None and parameter.device != images.device:
        raise ModelError(
            f"The model is on {parameter.device} and the images are on {images.device}; move one to "
            "the other."
        )
    door = Door()
    before = sample.clone()
    answer = _ask(asked, sample)
    if not torch.equal(before, sample):
        door = replace(door, clone=True)
        findings.append(
            "The model changes the images it is given (in-place code); it gets a clone each time."
        )
        sample = before
        answer = _ask(asked, sample.clone())
    take, flatten, said = where_logits(answer, len(sample))
    door = replace(door, take=take, flatten=flatten)
    findings += said
    logits = taken(answer, take).flatten(1).detach()
    if not logits.isfinite().all():
        raise NonFiniteError(
            "The model answers clean images with logits that are NaN or infinite; get another copy of "
            "its weights, or give it images as it was trained on them."
        )
    undo, bypass, said = _undone(asked, sample, take, logits)
    door = replace(door, undo=undo, bypass=bypass)
    findings += said
    door.install(asked)
    # before passes without gradients: what modules keep of the last of those can be copied
    _require_gradients(asked, sample)
    _require_own_answers(asked, sample)
    if not _takes_any_layout(asked, sample):
        door = replace(door, contiguous=True)
        Door(contiguous=True).install(asked)
    return Admitted(plain, asked, door, tuple(findings))


def _ask(model: nn.Module, images: Tensor) -> Any:
    """The model's answer as it is.

    Raises:
        ModelError: its forward raised, with its own line.
    """
    try:
        with torch.no_grad():
            return model(images)
    except BimaskError:
        raise
    except Exception as error:  # whatever a user's forward raises
        raise ModelError(
            f"The model's forward fails on images {tuple(images.shape)} of {images.dtype}: "
            f"{_first(error)}{_line(error)}; give images of the size and channels it was trained on."
        ) from error


def _first(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {shorten(text, 200)}" if text else type(error).__name__


def _line(error: Exception) -> str:
    """The user's own line that raised, for a message."""
    torchs = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((torchs, HERE, "<")):
            code = shorten(frame.line or "", 100)
            return f" (line {frame.lineno} of {Path(frame.filename).name}: {code})"
    return ""


def _undone(
    model: nn.Module, images: Tensor, take: str | int | None, rows: Tensor
) -> tuple[Undo, tuple[str, ...], list[str]]:
    """What the rows are if they are no logits, and how that is undone.

    Raises:
        ModelError: it cannot be undone exactly.
    """
    if (name := _closing_module(model, images, rows)) is not None:
        kind = type(model.get_submodule(name)).__name__
        return "nothing", (name,), [f"The model ends in {kind} ({name}), which is stepped around."]
    if bool((rows >= 0).all()) and bool((rows.sum(1) - 1).abs().max() <= 1e-3):
        if bool((rows == 0).any()):
            raise ModelError(
                "The model answers with probabilities of which some are exactly 0, so their logits "
                "are lost; let its forward return what goes into the softmax."
            )
        return (
            "log",
            (),
            ["The model answers with probabilities; their logarithms are taken as logits."],
        )
    with torch.no_grad(), _Sigmoids() as called:
        answer = taken(model(images.clone()), take)
    if any(found is answer for found in called.answers):
        raise ModelError(
            "The model answers with sigmoids, numbers in [0, 1] that do not add up to 1; let its "
            "forward return what goes into the sigmoid: a defence needs logits."
        )
    return "nothing", (), []


class _Sigmoids(TorchFunctionMode):
    """Keeps what `sigmoid` answers while it is open, called as a function or as a method."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Any] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        answer = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("sigmoid", "sigmoid_", "special_expit"):
            self.answers.append(answer)
        return answer


def _closing_module(model: nn.Module, images: Tensor, rows: Tensor) -> str | None:
    """Name of the softmax or sigmoid module whose output the rows are, and that is called for nothing
    else."""
    names = [name for name, module in model.named_modules() if name and isinstance(module, CLOSING)]
    with torch.no_grad(), watched(model, names) as seen:
        model(images.clone())
    for name, found in reversed(seen.items()):
        last = found.outputs[-1]
        if last.numel() == rows.numel() and torch.equal(last.flatten(1), rows):
            return name if len(found.outputs) == 1 else None
    return None


@torch.no_grad()
def _require_own_answers(model: nn.Module, images: Tensor) -> None:
    """Raise if an image's answer is not the same again, or depends on the images beside it."""
    first = model(images)
    scale = first.abs().amax().clamp_min(1e-6)

    def differs(got: Tensor, expected: Tensor) -> bool:
        return bool((got - expected).abs().max() > SAME * scale)

    if differs(model(images), first):
        raise ModelError(
            "The model answers the same images otherwise when asked again, in eval mode: dropout or "
            "noise that `model.eval()` does not switch off, as `F.dropout` without "
            "`training=self.training`; switch it off."
        )
    others = torch.cat([1 - images, images.flip(0)])
    alone = differs(_ask_others(model, images[:1], len(images)), first[:1])
    if alone or differs(_ask_others(model, others, len(images))[len(images) :].flip(0), first):
        raise ModelError(
            "The model's answer to an image depends on the other images of the batch"
            f"{_mixer(model)}; every image must be answered by itself."
        )


def _ask_others(model: nn.Module, images: Tensor, before: int) -> Tensor:
    """Logits for another number of images than `before`.

    Raises:
        ModelError: the forward takes no other number.
    """
    try:
        logits: Tensor = model(images)
    except Exception as error:  # whatever a user's forward raises
        raise ModelError(
            f"The model's forward takes {before} images but fails on {len(images)}: {_first(error)}"
            f"{_line(error)}; let it take any number, by `flatten(1)` and not by `squeeze()` or a "
            "number of its own."
        ) from error
    return logits


def _mixer(model: nn.Module) -> str:
    """The likely reason why images are mixed, for a message."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return (
                f": {name} has no running statistics and takes those of the batch; train it with "
                "`track_running_stats=True`"
            )
        if isinstance(module, _BatchNorm) and module.training:
            return f": {name} stays in training mode after `model.eval()`"
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            attention = getattr(module, "self_attn", module)
            if not attention.batch_first:
                return (
                    f": {name} takes the first dimension for the sequence; make it with "
                    "`batch_first=True`, or give it (tokens, images, channels)"
                )
    return ""


@torch.no_grad()
def _takes_any_layout(model: nn.Module, images: Tensor) -> bool:
    """Whether the model answers images in channels_last as it does others."""
    images = images.repeat(2, 1, 1, 1)  # one alone has no stride from image to image
    expected = model(images.contiguous())
    try:
        got = model(images.clone(memory_format=torch.channels_last))
    except RuntimeError:  # view: size is not compatible with stride
        return False
    return bool((got - expected).abs().max() <= SAME * expected.abs().max().clamp_min(1e-6))


def _require_gradients(model: nn.Module, images: Tensor) -> None:
    """Raise if no gradient gets from the logits to the images, or only by way of further passes."""
    moved = images.detach().clone().requires_grad_()
    slope = None
    with _counted(model) as calls:
        try:
            with torch.enable_grad():
                logits = model(moved)
                forward = len(calls)
                if logits.requires_grad:
                    unlike = torch.arange(logits.shape[1]).to(logits)  # the plain sum may be constant
                    (slope,) = torch.autograd.grad((logits * unlike).sum(), moved, allow_unused=True)
        except Exception as error:  # whatever a user's backward raises
            raise ModelError(
                f"No gradient gets through the model ({_first(error)}{_line(error)}); let its forward "
                "be differentiable: no in-place change of what a gradient needs."
            ) from error
    if slope is None or not (slope.any() or _constant(model, images)):
        raise ModelError(
            "No gradient gets through the model: its forward runs without gradients, or detaches or "
            "rounds what it computes (`torch.no_grad`, `detach`, `round`, numpy); take that out."
        )
    if len(calls) > forward:
        raise ModelError(
            f"The model calls {calls[-1]} once more for its gradients (`torch.utils.checkpoint`), "
            "where no mask stands; switch that off, as by `set_grad_checkpointing(False)`."
        )


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules that are called while the context is open, one a call."""
    calls: list[str] = []
    with ExitStack() as undo:
        for name, module in model.named_modules():
            handle = module.register_forward_pre_hook(lambda _m, _i, name=name: calls.append(name))
            undo.callback(handle.remove)
        yield calls


@torch.no_grad()
def _constant(model: nn.Module, images: Tensor) -> bool:
    """Whether other images get the same logits."""
    return torch.equal(model(images), model(1 - images))

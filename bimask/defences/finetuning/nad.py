"""Neural attention distillation: the student looks where a fine-tuned teacher looks.

Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural
Networks", ICLR 2021 (arXiv 2101.05930). The teacher is the suspect after some epochs of plain
fine-tuning; the student is the suspect, and learns (equations 2 to 4)

    CE(f(x), y) + sum_l beta_l mean (A_l / ||A_l|| - A'_l / ||A'_l||)^2,    A_l = sum_c |F_lc|^2,

F_l being the feature maps at the end of stage l, A' the teacher's, || || the norm over the pixels of an
image, and the mean over images and pixels. Stages are the last three of a residual net: sums of two
feature maps of one shape are a stage, as a forward pass shows, and the block of its last sum ends it.
Of a net without such sums the last convolution is the one stage.

Use it against triggers of few pixels, which draw attention to themselves. It costs one pass forward and
back of every image an epoch of the teacher, and two forward and one back an epoch of the student. It
needs labels and a convolution; feature maps of one pixel have no attention, and their terms are 0.

Otherwise than in the published code: the student's batch norms learn as its weights do, and the
teacher's stand still in the second phase. The published weights are 500, 1000, 1000; here they are
`beta`, of which the third last stage has half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, cosine, logits_of, set_lr, steps_an_epoch
from bimask.defences.settings import Search
from bimask.defences.sgd import Epochs, FineTuningConfig, descend, epoch_of, sgd
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.errors import ModelError
from bimask.masking.copies import copied
from bimask.nets.admission import admit

SHARES = (0.5, 1.0, 1.0)  # of beta, of the last three stages
SUMS = ("add", "add_", "__add__", "__radd__", "__iadd__")


class NadConfig(FineTuningConfig):
    """The settings of NAD; in both phases the learning rate follows a cosine to 0."""

    teacher_epochs: Annotated[
        int,
        Field(ge=1, description="times that every image is seen by the teacher"),
        Search(1, 50, log=True),
    ] = 10
    epochs: Epochs = 10
    beta: Annotated[
        float,
        Field(
            ge=0,
            description="weight of the attention of the last two stages, and twice that of the third",
        ),
        Search(10, 10_000, log=True),
    ] = 1000.0

    def steps(self, images: int) -> int:
        """Batches over all epochs of teacher and student."""
        return (self.teacher_epochs + self.epochs) * steps_an_epoch(images, self.batch_size)


class Nad(SimpleDefence[NadConfig]):
    """Neural attention distillation."""

    name = "nad"
    config = NadConfig
    needs_labels = True

    def check(self, model: nn.Module, images: Tensor) -> None:
        stages_of(admit(model, images).model, images)

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: NadConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[NadConfig]:
        """Fine-tune a teacher, then the student after it.

        Raises:
            ModelError: the model has no convolution.
        """
        net = admit(model, clean.images).model
        stages = stages_of(net, clean.images)
        betas = [config.beta * share for share in SHARES[-len(stages) :]]
        net.train().requires_grad_(True)
        teacher = copied(net)
        learning = sgd(teacher, config)
        optimiser = sgd(net, config)
        with Loop(
            self,
            model,
            config,
            {"net": net, "moments": optimiser, "teacher": teacher, "learning": learning},
            lambda: (net.state_dict(), {}),
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for epoch in loop.epochs(config.teacher_epochs):
                set_lr(learning, config.lr * cosine(epoch, config.teacher_epochs))
                for images, labels in epoch_of(clean, config, generator, teacher):
                    loss = F.cross_entropy(logits_of(teacher, images), labels)
                    descend(learning, loss)
                    loop.passes.add(forward=1, backward=1)
                    if loop.step({"teacher": loss.item()}, on_step):
                        return loop.result()
            teacher.eval().requires_grad_(False)
            with features_of(net, stages) as own, features_of(teacher, stages) as taught:
                for epoch in loop.epochs(config.epochs):
                    set_lr(optimiser, config.lr * cosine(epoch, config.epochs))
                    for images, labels in epoch_of(clean, config, generator, net):
                        cross_entropy = F.cross_entropy(logits_of(net, images), labels)
                        with torch.no_grad():
                            teacher(images)
                        apart = torch.stack(
                            [
                                beta * attention_loss(own[stage], taught[stage])
                                for stage, beta in zip(stages, betas, strict=True)
                            ]
                        ).sum()
                        descend(optimiser, cross_entropy + apart)
                        loop.passes.add(forward=2, backward=1)
                        terms = {"cross_entropy": cross_entropy.item(), "attention": apart.item()}
                        if loop.step(terms, on_step):
                            return loop.result()
            return loop.result()


def attention(features: Tensor) -> Tensor:
    """Where feature maps (B, C, *pixels) are strong: (B, pixels) >= 0, of norm 1."""
    return F.normalize(features.square().sum(1).flatten(1), eps=1e-6)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of the attention in feature maps (B, C, *pixels)."""
    return F.mse_loss(attention(student), attention(teacher))


@contextmanager
def features_of(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules answered last, by name, while the context is open."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as undo:
        for name in names:
            handle = net.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, name=name: seen.update({name: output})
            )
            undo.callback(handle.remove)
        yield seen


@torch.no_grad()
def stages_of(net: nn.Module, images: Tensor) -> list[str]:
    """The modules that end the last three stages of a residual net, or its last convolution.

    Raises:
        ModelError: the net has neither.
    """
    open_modules: list[str] = []  # those that a forward pass is in
    answers: dict[str, Any] = {}
    convolutions: list[str] = []
    sums: list[tuple[torch.Size, list[str]]] = []

    class _Sums(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if getattr(function, "__name__", "") in SUMS:
                shapes = [arg.shape for arg in args[:2] if isinstance(arg, Tensor)]
                if len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) > 3:
                    sums.append((shapes[0], list(open_modules)))
            return function(*args, **(kwargs or {}))

    def enter(name: str) -> Any:
        return lambda *_: open_modules.append(name)

    def leave(name: str) -> Any:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            open_modules.remove(name)
            answers[name] = output
            if isinstance(module, nn.modules.conv._ConvNd):
                convolutions.append(name)

        return hook

    with ExitStack() as undo, _Sums():
        for name, module in net.named_modules():
            if name:
                undo.callback(module.register_forward_pre_hook(enter(name)).remove)
                undo.callback(module.register_forward_hook(leave(name)).remove)
        net(images[:1].to(next(net.parameters()).dtype))
    stages: dict[torch.Size, str] = {}  # shape -> block, in the order of their last sums
    for shape, inside in sums:
        blocks = [name for name in inside if getattr(answers.get(name), "shape", None) == shape]
        if blocks:
            stages.pop(shape, None)
            stages[shape] = blocks[-1]
    if not stages and not convolutions:
        raise ModelError(
            "NAD compares where convolutions look, and this model has none; take another defence, such "
            "as `ft_sam`."
        )
    return list(stages.values())[-len(SHARES) :] or convolutions[-1:]

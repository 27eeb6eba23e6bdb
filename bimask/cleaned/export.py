"""A plain model as a file that needs none of this project: torch.export or ONNX, checked on images.

No pickle is written: a .pt2 file keeps its example inputs as one, so they are taken out first.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bimask.errors import ExportError, SettingError
from bimask.masking.discovery import row_scale

FOLDED = 1e-5  # what folding may change of a row's logits, as a share of the largest, in float32
EXPORTED = 1e-4  # what another runtime may


def require_equal(got: Tensor, expected: Tensor, bound: float, what: str) -> float:
    """The largest absolute difference of two sets of logits (N, K), if it is small enough.

    Small is `|got - expected| <= bound * max(1, largest |expected| of the row)`: rounding grows with
    what is added up, and wrong folds are off by orders more.

    Raises:
        ExportError: it is not, or either is not finite.
    """
    error = (got - expected).abs()
    if not (error <= bound * row_scale(expected)).all():  # so NaN is refused, too
        raise ExportError(
            f"{what} answers otherwise than the model it was made from: logits differ by "
            f"{error.max().item():.3g}, {bound:g} is allowed; nothing was written."
        )
    return error.max().item()


def export_program(model: nn.Module, images: Tensor, path: Path) -> float:
    """Write `model` as a torch.export program (.pt2) for any number of images.

    Args:
        model: (N, C, H, W) float32 in [0, 1] -> (N, K) logits; left as it is.
        images: (N, C, H, W), N >= 2, of the size to be served; the file is checked on them.

    Returns:
        The largest difference of a logit between model and file.

    Raises:
        ExportError: it cannot be exported, or the file answers otherwise.
    """

    def write(plain: nn.Module, part: Path) -> None:
        batch = torch.export.Dim("batch", min=1, max=1 << 16)
        program = torch.export.export(plain, (images[:2],), dynamic_shapes=({0: batch},), strict=False)
        program.example_inputs = None  # would be pickled
        torch.export.save(program, part)

    def answers(part: Path) -> Tensor:
        return torch.export.load(part).module()(images)

    return _exported(model, images, path, ".pt2", write, answers)


def export_onnx(model: nn.Module, images: Tensor, path: Path) -> float:
    """Write `model` as ONNX for any number of images; input `images`, output `logits`.

    Arguments, result and errors as of `export_program`; the file is checked with onnxruntime. Needs the
    extra `onnx`.
    """
    try:
        importlib.import_module("onnxscript")
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise SettingError(
            f"ONNX needs {error.name}, which is not installed; pip install 'bimask[onnx]'."
        ) from error

    def write(plain: nn.Module, part: Path) -> None:
        torch.onnx.export(
            plain,
            (images[:2],),
            part,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )

    def answers(part: Path) -> Tensor:
        session = runtime.InferenceSession(part, providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"images": images.numpy().astype(np.float32)})
        return torch.from_numpy(logits)

    return _exported(model, images, path, ".onnx", write, answers)


@torch.no_grad()
def _exported(
    model: nn.Module,
    images: Tensor,
    path: Path,
    suffix: str,
    write: Callable[[nn.Module, Path], None],
    answers: Callable[[Path], Tensor],
) -> float:
    """Write to a file beside `path`, check it, and give it its name."""
    if path.suffix != suffix:
        raise SettingError(f"The file must end in {suffix}, got {path}.")
    plain, images = copy.deepcopy(model).cpu().eval(), images.cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporters' own deprecations
                write(plain, part)
                got = answers(part)
        except Exception as error:  # whatever a tracer says of a model that it cannot follow
            first = (str(error).strip().splitlines() or [""])[0]
            raise ExportError(
                f"The model cannot be written as {suffix} ({type(error).__name__}: {first[:200]})."
            ) from error
        worst = require_equal(got, plain(images), EXPORTED, f"The {suffix} file")
        part.replace(path)
    return worst

"""Models that were trained elsewhere: their weights, read safely into a net."""

from __future__ import annotations

import hashlib
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bimask.errors import VictimError

# Where training programs keep the state dict beside epochs and optimiser.
NESTED = ("state_dict", "model_state_dict", "model")
PARALLEL = "module."  # what nn.DataParallel puts before every name


def file_sha256(path: str | Path) -> str:
    """64 hex digits of a file's content.

    Raises:
        VictimError: it cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise VictimError(f"Cannot read {path} ({error.strerror}); mend its path.") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pt or .pth file; nothing in it is executed.

    A dict around it (`state_dict`, `model_state_dict`, `model`) and nn.DataParallel's `module.` before
    every name are taken off.

    Raises:
        VictimError: another kind of file, one that cannot be read as plain tensors, no tensors.
    """
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise VictimError(f"Weights must be a .safetensors, .pt or .pth file, got {path}.")
    if not path.is_file():
        raise VictimError(f"There is no file of weights {path}; mend its path.")
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is not what it says
        raise VictimError(
            f"The weights {path} cannot be read as plain tensors ({type(error).__name__}: "
            f"{shorten(str(error), 160)}); save them as `safetensors.torch.save_file(net.state_dict(), "
            "...)`."
        ) from error
    if isinstance(content, dict):
        content = next((content[key] for key in NESTED if isinstance(content.get(key), dict)), content)
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise VictimError(
            f"The weights {path} must hold a state dict, names and tensors, but hold "
            f"{_described(content)}."
        )
    if all(name.startswith(PARALLEL) for name in content):
        content = {name.removeprefix(PARALLEL): value for name, value in content.items()}
    return content


def load_weights(net: nn.Module, path: Path, *, sha256: str | None = None) -> None:
    """Put the weights in a file into `net`, all of them and no others.

    Args:
        net: as its factory made it.
        sha256: what the file's content must have; None is any.

    Raises:
        VictimError: a file that cannot be read, is not the one meant, or does not fit.
    """
    weights = read_weights(path)
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise VictimError(
            f"The digest of the weights {path} is {found[:16]}, but {sha256[:16]} is asked for: the "
            "file changed; put the old one back, or leave `weights_sha256` out."
        )
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise VictimError(
            f"The weights {path} do not fit the net: {shorten(str(error), 300)}"
        ) from error


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    odd = [f"{name!r}: {type(v).__name__}" for name, v in content.items() if not isinstance(v, Tensor)]
    return ", ".join(odd[:3]) or "nothing"

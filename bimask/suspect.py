"""Models that were trained elsewhere: their weights, read safely into a net."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from bimask.errors import InteropError, VictimError
from bimask.interop.safe import dense, load_training
from bimask.interop.stand_ins import printable, shown

# Where training programs keep the state dict beside epochs and optimiser.
NESTED = ("state_dict", "model_state_dict", "model")
PARALLEL = "module."  # what nn.DataParallel puts before every name


def file_sha256(path: str | Path) -> str:
    """64 hex digits of a file's content.

    Raises:
        VictimError: it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for without end
            raise VictimError(f"Cannot read {path} (not a file); mend its path.")
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()
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
        content: Any = load_file(path) if path.suffix == ".safetensors" else load_training(path)
    except InteropError as error:
        raise VictimError(str(error)) from error
    except Exception as error:  # safetensors has errors of its own
        raise VictimError(
            f"The weights {path} cannot be read as plain tensors ({type(error).__name__}: "
            f"{shorten(str(error), 160)}); save them as `safetensors.torch.save_file(net.state_dict(), "
            "...)`."
        ) from error
    if isinstance(content, dict):
        content = next((content[key] for key in NESTED if isinstance(content.get(key), dict)), content)
    if odd := _odd_in(content):
        raise VictimError(
            f"The weights {path} must hold a state dict, names and real tensors, but hold {odd}."
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
            f"The weights {path} do not fit the net: {printable(shorten(str(error), 300))}"
        ) from error


def _odd_in(content: Any) -> str:
    """What in it is no weight under a name, for a message; empty where all is well."""
    if not isinstance(content, dict):
        return type(content).__name__
    if not content:
        return "nothing"
    odd = []
    for name, value in content.items():
        if not isinstance(value, Tensor):
            odd.append(f"{shown(name)}: {type(value).__name__}")
        elif not isinstance(name, str) or not dense(value) or value.is_complex():
            odd.append(f"{shown(name)}: {value.dtype} {tuple(value.shape)}")
    return ", ".join(odd[:3])

"""safetensors files, whose header is looked at before a tensor is made: the one reader of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bimask.files.bounded import parsed_json, require_regular

MAX_TENSORS = 20_000  # the largest nets have about a thousand
MAX_HEADER = 8 * 2**20
MAX_BYTES = 8 * 2**30
OF_STATES = 8  # times as much: what a run keeps of itself is of many members, with their histories


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        SafetensorError: it is none, or has more tensors than are read.
        OSError: it cannot be read; also if it is no regular file, which could be without end.
    """
    return read_tensors(path)[0]


def read_tensors(path: Path | str, times: int = 1) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same, and the metadata in its header.

    Args:
        times: what is read is so many times what a stranger's file may have, see `OF_STATES`.
    """
    about = require_header(path, times)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def require_header(path: Path | str, times: int = 1) -> dict[str, str]:
    """The metadata of a safetensors file, whose tensors are left alone; raises as `load_tensors`."""
    try:
        require_regular(path, MAX_BYTES)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > times * MAX_HEADER:
                raise ValueError(
                    f"a header of {length} bytes, but at most {times * MAX_HEADER} are read"
                )
            header: Any = parsed_json(file.read(length), most_keys=times * MAX_TENSORS)
        about = header.get("__metadata__") if isinstance(header, dict) else None
    except ValueError as error:
        raise SafetensorError(f"its header is refused: {error}") from error
    return about if isinstance(about, dict) else {}

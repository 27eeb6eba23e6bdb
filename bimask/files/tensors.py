"""safetensors files of strangers, whose header is looked at before a tensor is made."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bimask.files.bounded import parsed_json, require_regular

MAX_TENSORS = 20_000  # the largest nets have about a thousand
MAX_HEADER = 8 * 2**20
MAX_BYTES = 8 * 2**30


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        SafetensorError: it is none, or has more tensors than are read.
        OSError: it cannot be read.
    """
    try:
        require_regular(path, MAX_BYTES)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length} bytes, but at most {MAX_HEADER} are read")
            parsed_json(file.read(length), most_keys=MAX_TENSORS)
    except ValueError as error:
        raise SafetensorError(f"its header is refused: {error}") from error
    return load_file(path)

"""What takes the place of numpy's and PIL's classes where a stranger's pickle asks for them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bimask.errors import InteropError
from bimask.errors import printable as printable

MAX_SIDE = 1024  # pixels
PATHS = ("PosixPath", "PurePosixPath", "WindowsPath")


def shown(value: object) -> str:
    """A value of a stranger for a message: short, on one line, never a nest of containers."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        text = repr(value)
        return text if len(text) <= 90 else text[:87] + "..."
    return f"a {type(value).__name__}"


class StoredType:
    """Stands in for `numpy.dtype`: booleans, integers and floats, nothing else."""

    def __init__(self, code: object = "", _align: object = False, _copy: object = False) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise InteropError(
                f"it holds a numpy array of type {shown(code)}, but only numbers are read"
            )
        self.code = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]
        else:
            raise InteropError("it holds a numpy type that is malformed")

    def read(self, data: object, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Bytes as an array of this type."""
        dtype = np.dtype(self.order + self.code)
        if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
            raise InteropError("it holds a numpy array whose bytes do not fit its shape")
        return np.frombuffer(data, dtype).reshape(shape)


class StoredArray:
    """Stands in for `numpy.ndarray`; `value` is the array."""

    value: np.ndarray[Any, Any]

    def __setstate__(self, state: Any) -> None:
        try:
            _version, shape, dtype, by_columns, data = state
        except (TypeError, ValueError):
            shape = dtype = by_columns = data = None
        sizes = shape if isinstance(shape, tuple) else (-1,)
        if not isinstance(dtype, StoredType) or not all(type(n) is int and n >= 0 for n in sizes):
            raise InteropError("it holds a numpy array that is malformed")
        if by_columns and len(sizes) > 1:
            raise InteropError("it holds a numpy array stored by columns, which no known format has")
        self.value = dtype.read(data, sizes)


class StoredPicture:
    """Stands in for `PIL.Image.Image`; `pixels` is (C, H, W) uint8."""

    pixels: Tensor

    def __setstate__(self, state: Any) -> None:
        try:
            _info, mode, (width, height), _palette, data = state
        except (TypeError, ValueError):
            raise InteropError("it holds a picture that is malformed") from None
        channels = {"L": 1, "RGB": 3}.get(mode) if isinstance(mode, str) else None
        sides = type(width) is int and type(height) is int
        if channels is None or not (sides and 1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
            raise InteropError(
                f"it holds a picture of mode {shown(mode)} and size "
                f"{shown(width)}x{shown(height)}, but only L and RGB up to {MAX_SIDE} pixels a "
                "side are read"
            )
        if not isinstance(data, bytes) or len(data) != width * height * channels:
            raise InteropError("it holds a picture whose bytes do not fit its size")
        rows = np.frombuffer(data, np.uint8).reshape(height, width, channels)
        self.pixels = torch.from_numpy(rows.copy()).permute(2, 0, 1).contiguous()


class StoredNothing:
    """Stands in for what is of no use here, as a program's options are: keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> StoredNothing:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def array_of(kind: object, _shape: object = None, _code: object = None) -> StoredArray:
    """Stands in for numpy's `_reconstruct`: an array that has no numbers yet."""
    if kind is not StoredArray:
        raise InteropError("it holds a numpy array of a class of its own")
    return StoredArray()


def _no_bytes() -> bytes:
    return b""


def scalar_of(dtype: object, data: object) -> int | float | bool:
    """Stands in for numpy's `scalar`."""
    if not isinstance(dtype, StoredType):
        raise InteropError("it holds a numpy number that is malformed")
    number: int | float | bool = dtype.read(data, ()).item()
    return number


STAND_INS: list[Any] = [
    (_no_bytes, "builtins.bytes"),
    (StoredType, "numpy.dtype"),
    (StoredArray, "numpy.ndarray"),
    (StoredPicture, "PIL.Image.Image"),
    (StoredNothing, "argparse.Namespace"),
    *((StoredNothing, f"{home}.{kind}") for home in ("pathlib", "pathlib._local") for kind in PATHS),
    *((array_of, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((scalar_of, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]

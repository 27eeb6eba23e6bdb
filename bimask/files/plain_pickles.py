"""Pickles of tensors and arrays that Python's `pickle` wrote, not `torch.save`.

Nothing is unpickled: the operations are followed here one by one, by a machine that knows containers,
numbers, texts and the few names below. Each name stands for a function of ours; none is imported, and
no attribute is set on anything. What it takes of memory is bounded by the length of the pickle and by
the number of its operations.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bimask.errors import InteropError
from bimask.files.stand_ins import PATHS, StoredArray, StoredNothing, StoredType, array_of, scalar_of

MAGIC_NUMBER = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch's format before zip, a pickle of its own
MAX_OPERATIONS = 10_000_000  # a container is one of a byte, and takes a hundred of memory
DTYPES = {
    f"torch {kind}Storage": dtype
    for kind, dtype in {
        "BFloat16": torch.bfloat16,
        "Bool": torch.bool,
        "Byte": torch.uint8,
        "Char": torch.int8,
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "Int": torch.int32,
        "Long": torch.int64,
        "Short": torch.int16,
    }.items()
}


class UnknownName(InteropError):
    """A pickle asks for something that is not known here; `name` is "module name"."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it asks for {name}")
        self.name = name


@dataclass(frozen=True)
class _Name:
    """A name that a pickle asked for, and no more than that."""

    name: str


def load_plain(pickle: bytes) -> Any:
    """What a pickle holds: containers, numbers, texts, tensors; numpy's arrays as `StoredArray`.

    Raises:
        UnknownName: it asks for anything else.
        InteropError: it is malformed; of damaged ones, pickletools, torch and lists raise errors of
            their own.
    """
    return _Machine(CALLED, HELD).run(io.BytesIO(pickle))


class _Machine:
    """Follows the operations of one pickle.

    Args:
        called: what stands for each name that may be called.
        held: names that may be held, but not called.
        stored: the value of a persistent id; None where there must be none.
    """

    def __init__(
        self,
        called: Mapping[str, Callable[..., Any]],
        held: frozenset[str],
        stored: Callable[[Any], Any] | None = None,
    ) -> None:
        self.called = called
        self.held = held
        self.stored = stored
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """The object; the stream is left behind it."""
        for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if code.name == "STOP":
                break
            if count > MAX_OPERATIONS:
                raise InteropError(f"its pickle has more than {MAX_OPERATIONS} operations")
            self._step(code.name, argument)
        return self.stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        if name in ARGUMENTS:
            self.stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in BUILT_OF_MARKED:
            built = BUILT_OF_MARKED[name](self._marked())
            self.stack.append(built)
        elif name.startswith("TUPLE"):  # TUPLE1 to TUPLE3
            count = int(name[-1])
            items = [self.stack.pop() for _ in range(count)]
            self.stack.append(tuple(reversed(items)))
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name == "POP":
            self.stack.pop()
        elif name == "POP_MARK":
            self._marked()
        elif name.endswith("PUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name.endswith("GET"):
            self.stack.append(self.memo[argument])
        elif name in ("APPEND", "APPENDS"):
            items = [self.stack.pop()] if name == "APPEND" else self._marked()
            _of(list, self.stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.stack.pop(-2), self.stack.pop()] if name == "SETITEM" else self._marked()
            _of(dict, self.stack[-1]).update(_pairs(items))
        elif name == "ADDITEMS":
            items = self._marked()
            _of(set, self.stack[-1]).update(_keys(items))
        elif name == "GLOBAL":
            self.stack.append(self._asked(argument))
        elif name == "STACK_GLOBAL":
            what, module = _of(str, self.stack.pop()), _of(str, self.stack.pop())
            self.stack.append(self._asked(f"{module} {what}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, what = _of(tuple, self.stack.pop()), _of(_Name, self.stack.pop())
            if what.name not in self.called:
                raise InteropError(f"its pickle calls {what.name}, which is no function")
            self.stack.append(self.called[what.name](*arguments))
        elif name == "BUILD":
            state = self.stack.pop()
            if isinstance(self.stack[-1], (StoredType, StoredArray, StoredNothing)):
                self.stack[-1].__setstate__(state)
            else:  # a state dict's versions of its modules, which are not needed
                _of(OrderedDict, self.stack[-1])
        elif name == "BINPERSID" and self.stored is not None:
            self.stack.append(self.stored(self.stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise InteropError(f"its pickle has the operation {name}, which tensors do not need")

    def _marked(self) -> list[Any]:
        """What stands above the last mark, which is taken off."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _asked(self, name: str) -> _Name:
        if name not in self.called and name not in self.held:
            raise UnknownName(name)
        return _Name(name)


def _of(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise InteropError(f"its pickle has a {type(value).__name__} where a {kind.__name__} must be")
    return value


HASHED = (str, int, float, bytes, type(None), _Name)


def _keys(items: list[Any]) -> list[Any]:
    """Only what is hashed without going into depth: tuples in tuples can be too deep for that."""
    if odd := next((item for item in items if not isinstance(item, HASHED)), None):
        raise InteropError(f"its pickle has a {type(odd).__name__} as a key")
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(_keys(items[::2]), items[1::2], strict=True))


ARGUMENTS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    }
)
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
BUILT_OF_MARKED: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": _pairs,
    "FROZENSET": lambda items: frozenset(_keys(items)),
}


def _ordered_dict() -> OrderedDict[Any, Any]:
    return OrderedDict()


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage's numbers; torch refuses one that goes beyond them."""
    return torch.as_strided(_of(Tensor, storage), size, stride, offset)


def _parameter(data: Any, *_: Any) -> Tensor:
    tensor: Tensor = _of(Tensor, data)
    return tensor


def _storage(data: Any) -> Tensor:
    """The numbers of one storage, (N,), as `torch.save` wrote it before zip.

    Four pickles (magic number, version, system, what it is), one of its key, its length, its bytes.
    """

    def declared(value: Any) -> tuple[torch.dtype, int]:
        word, kind, _key, _device, count, view = value
        if word != "storage" or view is not None or type(count) is not int:
            raise InteropError("it holds a storage that is malformed")
        return DTYPES[_of(_Name, kind).name], count

    stream = io.BytesIO(_of(bytes, data))
    names = frozenset(DTYPES)
    for _ in range(3):
        _Machine({}, frozenset()).run(stream)
    dtype, count = _of(tuple, _Machine({}, names, declared).run(stream))
    _Machine({}, frozenset()).run(stream)
    length, numbers = stream.read(8), stream.read()
    if int.from_bytes(length, "little") != count or len(numbers) != count * dtype.itemsize:
        raise InteropError("it holds a storage whose bytes do not fit its length")
    return torch.frombuffer(bytearray(numbers), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _text_as_bytes(text: Any, encoding: Any) -> bytes:
    """How protocols below 3 spell bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise InteropError("it holds bytes that are malformed")
    encoded: bytes = _of(str, text).encode("latin-1")
    return encoded


def _array(kind: Any, *_: Any) -> StoredArray:
    return array_of(StoredArray if kind == _Name("numpy ndarray") else kind)


def _array_of_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> StoredArray:
    """How protocol 5 spells an array."""
    array = StoredArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


CALLED: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch.storage _load_from_bytes": _storage,
    "_codecs encode": _text_as_bytes,
    "numpy dtype": StoredType,
    **{f"numpy.{core}.multiarray _reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": scalar_of for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _array_of_buffer for core in ("core", "_core")},
    "__builtin__ bytes": lambda: b"",
    "builtins bytes": lambda: b"",
    **{
        name: StoredNothing
        for name in (
            *("__builtin__ set", "builtins set", "collections Counter", "torch Size", "torch device"),
            "argparse Namespace",
            *(f"{home} {kind}" for home in ("pathlib", "pathlib._local") for kind in PATHS),
        )
    },
}
HELD = frozenset(
    {
        "numpy ndarray",
        *(f"torch {kind}" for kind in ("bfloat16", "float16", "float32", "float64", "int64", "uint8")),
    }
)

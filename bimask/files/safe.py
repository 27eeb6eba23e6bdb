"""`torch.save` files of strangers: looked through before they are opened, and nothing of them is run.

A file passes four gates:

    its zip     size, entries and checksums; nothing is compressed, so that nothing can unfold
    its names   the globals its pickle asks for, by disassembly; any but those in `ALLOWED` refuses it
    torch.load  with `weights_only` and that list alone, memory-mapped: a tensor that claims more bytes
                than the file has is refused, not read
    stand-ins   of `stand_ins.py` for numpy and PIL: a pickle can hand both states that corrupt
                memory or ask for any amount of it, so neither sees one

A pickle that torch did not write is read by `plain_pickles.py`, which knows less than any unpickler.

What is not bounded is time: a file within the limits can be made slow to read.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from bimask.errors import InteropError
from bimask.files.plain_pickles import MAGIC_NUMBER, UnknownName, load_plain
from bimask.files.stand_ins import PATHS, STAND_INS, StoredArray, printable, shown

MAX_FILE_BYTES = 8 * 2**30  # of a file, and so of everything in it: nothing in it is compressed
MAX_PICKLE_BYTES = 2 * 2**30  # of the part that is not tensors: v1 files keep pictures there
MAX_DIRECTORY_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 100_000_000  # of safetensors, whose own limit it is
MAX_ENTRIES = 20_000  # tensors in a file; the largest nets have about a thousand

ALLOWED = frozenset(
    {
        "_codecs encode",  # how protocol 2 spells bytes
        "__builtin__ bytes",  # and none of them
        "collections OrderedDict",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        *(f"torch {kind}Storage" for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float")),
        *(f"torch {kind}Storage" for kind in ("Half", "Int", "Long", "Short")),
        "numpy dtype",
        "numpy ndarray",
        "numpy.core.multiarray _reconstruct",  # numpy < 2, hence all published files
        "numpy.core.multiarray scalar",
        "numpy._core.multiarray _reconstruct",
        "numpy._core.multiarray scalar",
        "PIL.Image Image",
    }
)

# What training programs keep beside weights: plain containers, shapes and types in optimisers' states,
# and a program's options, which are read as nothing.
BESIDE_WEIGHTS = frozenset(
    {
        "__builtin__ set",
        "argparse Namespace",
        "collections Counter",
        *(f"{home} {kind}" for home in ("pathlib", "pathlib._local") for kind in PATHS),
        "torch Size",
        "torch device",
        *(f"torch {kind}" for kind in ("bfloat16", "float16", "float32", "float64", "int64", "uint8")),
    }
)
ZIP = b"PK\3\4"
PICKLES_BEFORE_ZIP = 5  # magic number, version, system, the object, the storages' keys
OBJECT_BEFORE_ZIP = 3  # which of them is the object
PICKLE = re.compile(rb"\x80[\0-\5]")  # protocols 0 and 1 begin in any way
# Under what names training programs keep the state dict beside epochs and optimiser.
STATE_KEYS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("weights", "params", "classifier", "model_ema", "ema"),
)
OF_A_MODULE = {"_parameters", "_buffers", "_modules"}  # attributes of every pickled nn.Module
# A pickle that asks for one of these may be made to do harm; nobody is told how to open it.
HARMFUL = frozenset(
    {
        *("__builtin__", "builtins", "os", "posix", "nt", "sys", "subprocess", "shutil", "importlib"),
        *("runpy", "pty", "socket", "webbrowser", "code", "codeop", "ctypes", "urllib", "operator"),
        *("io", "_io", "pickle", "_pickle", "timeit", "pdb", "bdb", "profile", "cProfile", "commands"),
    }
)
HARMLESS = frozenset(
    f"{home} {kind}"
    for home in ("__builtin__", "builtins")
    for kind in ("dict", "list", "tuple", "int", "float", "complex", "object", "slice", "range")
)
FOREIGN = {  # beginnings of other files, and what they are
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"BZh": "is compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "is compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it first",
    b"\x89HDF": "is HDF5, which other frameworks write; write its weights with torch.save",
}
TAR = (257, b"ustar")
Form = Literal["zip", "before zip", "pickle", "safetensors"]


def load_foreign(path: Path) -> Any:
    """What a `torch.save` file holds, with the stand-ins in the places of numpy and PIL.

    Raises:
        InteropError: no such file, not of this format, over a limit, damaged, or asking for code.
    """
    _refuse_unknown(path, pickled_names(path) - ALLOWED, "do not open it with other programs")
    return _load(path, mmap=True)


def form_of(path: Path) -> Form:
    """In which form a file of weights is written, by its first bytes; its name counts nothing.

    Raises:
        InteropError: in none that is known here.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(ZIP):
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < MAX_HEADER_BYTES:
        return "safetensors"  # asked first, since its length may begin as a pickle does
    if PICKLE.match(head):
        return "before zip" if MAGIC_NUMBER in head[:32] else "pickle"
    said = next((words for start, words in FOREIGN.items() if head.startswith(start)), None)
    if head[TAR[0] :].startswith(TAR[1]):
        said = "is a tar archive; unpack it first"
    raise InteropError(
        f"{path} {said}."
        if said
        else f"{path} is no whole file of torch.save, of today's zip format or the one before it, nor "
        "safetensors, nor a pickle; get another copy of it, or save `net.state_dict()` by torch.save."
    )


def load_training(path: Path) -> Any:
    """The same of a checkpoint of somebody's training: also what stands beside weights there
    (`BESIDE_WEIGHTS`), the format that `torch.save` had before zip, and plain pickles of tensors.

    Raises:
        InteropError: as of `load_foreign`; of one that asks for code it says what can be done instead.
    """
    form = form_of(path)
    if form == "pickle":
        return _load_plain(path)
    names = pickled_names(path) if form == "zip" else _names_before_zip(path)
    if unknown := names - ALLOWED - BESIDE_WEIGHTS:
        raise _asks_for_code(path, unknown, form)
    return _load(path, mmap=form == "zip")


def _load_plain(path: Path) -> Any:
    """What a pickle holds that torch did not write."""
    if (size := path.stat().st_size) > MAX_PICKLE_BYTES:
        raise InteropError(
            f"{path} is a pickle of {size} bytes, but at most {MAX_PICKLE_BYTES} are read; save it "
            "anew with torch.save."
        )
    try:
        return load_plain(path.read_bytes())
    except UnknownName as error:
        raise _asks_for_code(path, {error.name}, "pickle") from None
    except InteropError as error:
        raise InteropError(f"{path} is refused: {error}; get another copy of it.") from None
    except Exception as error:  # a hostile pickle can raise anything; nothing of it has been used yet
        raise InteropError(
            f"{path} is no whole pickle of tensors ({type(error).__name__}: {shown(str(error))}); get "
            "another copy of it, or save it anew with torch.save."
        ) from error


def _asks_for_code(path: Path, unknown: set[str], form: Form) -> InteropError:
    """The refusal of a pickle that asks for what none of ours does, with what its owner can do."""
    harmful = sorted(name for name in unknown - HARMLESS if re.split(r"[ .]", name)[0] in HARMFUL)
    what = shown((harmful or sorted(unknown - HARMLESS) or sorted(unknown))[0].replace(" ", ".", 1))
    if harmful:
        return InteropError(
            f"{path} is refused: it asks for {what} when it is read, but weights need nothing of the "
            "kind; nothing was run, do not open it with other programs, but ask for "
            "`net.state_dict()` alone."
        )
    inside, expression = _weights_in(path, form)
    return InteropError(
        f"{path} is refused: it holds {inside} and asks for {what} when it is read, which is code; "
        f"nothing was run, {_rewritten(path, expression)}."
    )


def _rewritten(path: Path, expression: str) -> str:
    """How the weights alone come into a file that is read here."""
    new = repr(printable(f"{path.name.partition('.')[0]}-weights.pt"))
    return f"run `torch.save({expression}, {new})` where you trust the file, and give the new one"


def _weights_in(path: Path, form: Form) -> tuple[str, str]:
    """What such a pickle holds, and the Python expression that has its weights."""
    quoted = repr(printable(str(path)))
    opened = f"torch.load({quoted}, weights_only=False)"
    if form == "pickle":
        opened = f"pickle.load(open({quoted}, 'rb'))"
    known, last, module_key = set(), "", ""
    texts: deque[str] = deque(
        ["model"], maxlen=8
    )  # before the first module's attributes, the last ones
    for name, argument in _operations(path, form):
        last = last if name == "STOP" else name
        if isinstance(argument, str) and argument in OF_A_MODULE.union(STATE_KEYS):
            known.add(argument)
        if module_key:
            continue
        if argument == "training":  # a module's first attribute: its key stands before
            module_key = texts[-1]
        elif name.endswith("UNICODE"):
            texts.append(argument)
        else:  # a class, by its module and name, or before zip with its file and its source
            for _ in range({"STACK_GLOBAL": 2, "BINPERSID": 3}.get(name, 0)):
                if len(texts) > 1:
                    texts.pop()
    if known >= OF_A_MODULE:
        place = "" if last == "BUILD" else f"[{module_key!r}]"
        return "a whole pickled module", f"{opened}{place}.state_dict()"
    likely = [key for key in STATE_KEYS if key in known and key != "params"]  # an optimiser has it, too
    return "more than tensors", f"{opened}[{likely[0]!r}]" if likely else "model.state_dict()"


def _operations(path: Path, form: Form) -> Iterator[tuple[str, Any]]:
    """Name and argument of the operations of the pickle that holds the object."""
    with ExitStack() as open_files:
        if form == "zip":
            archive = open_files.enter_context(zipfile.ZipFile(path))
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            file: Any = open_files.enter_context(archive.open(name))
        else:
            file = open_files.enter_context(open(path, "rb"))
        for _ in range(OBJECT_BEFORE_ZIP if form == "before zip" else 0):
            for _ in pickletools.genops(file):
                pass
        yield from ((code.name, argument) for code, argument, _ in pickletools.genops(file))


def _load(path: Path, *, mmap: bool) -> Any:
    """Open a file that was looked through."""
    try:
        with _only_stand_ins(), _named_otherwise(path) as name:
            return torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
    except InteropError as error:
        raise InteropError(f"{path} is refused: {error}; get another copy of it.") from None
    except Exception as error:  # a hostile pickle can raise anything; nothing of it has been used yet
        raise InteropError(
            f"{path} is refused: its contents are malformed ({type(error).__name__}); get another "
            "copy of it."
        ) from error


@contextmanager
def _named_otherwise(path: Path) -> Iterator[str]:
    """The path, or a link to it where torch would take the name, not the content, for safetensors."""
    if path.suffix != ".safetensors":
        yield str(path)
        return
    with TemporaryDirectory(prefix="bimask-") as folder:
        link = Path(folder, "weights")
        link.symlink_to(path.absolute())
        yield str(link)


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """Allow our list and nothing that the process allowed elsewhere."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(STAND_INS)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _refuse_unknown(path: Path, names: set[str], instead: str) -> None:
    """Refuse a pickle that asks for what none of ours does, before anything of it is interpreted."""
    if unknown := sorted(names):
        what = ".".join(unknown[0].split(" ", 1))
        raise InteropError(
            f"{path} is refused: it asks for {shown(what)} when it is read, but weights need "
            f"nothing of the kind; nothing was run, {instead}."
        )


def pickled_names(path: Path) -> set[str]:
    """The globals that a `torch.save` file asks for, each "module name", without opening any.

    Raises:
        InteropError: no such file, not of this format, over a limit, or damaged.
    """
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None
    if size is None:
        raise InteropError(f"{shown(str(path))} is not a file; give one written by torch.save.")
    if size > MAX_FILE_BYTES:
        raise InteropError(f"{path} has {size} bytes, but at most {MAX_FILE_BYTES} are read; split it.")
    try:
        if (directory := _directory_bytes(path, size)) > MAX_DIRECTORY_BYTES:
            raise InteropError(
                f"{path} is refused: its zip's directory has {directory} bytes, but at most "
                f"{MAX_DIRECTORY_BYTES} are read."
            )
        with zipfile.ZipFile(path) as archive:
            return _names_in(path, archive, size)
    except InteropError:
        raise
    except Exception as error:  # zipfile and pickletools raise a dozen kinds on damaged files
        raise InteropError(
            f"{path} is not a whole file of torch.save's zip format ({type(error).__name__}: "
            f"{shown(str(error))}); get another copy of it."
        ) from error


def _directory_bytes(path: Path, size: int) -> int:
    """How long a zip says its directory is, which `zipfile` reads whole and makes ten times as large.

    The records that say so are at the end; wherever something looks like one, the largest counts.
    """
    with open(path, "rb") as file:
        file.seek(max(0, size - 2**17))  # a comment can have 2**16 bytes
        tail = file.read()
    found = [0]
    for signature, place, kind in ((b"PK\5\6", 12, "<I"), (b"PK\6\6", 40, "<Q")):
        for match in re.finditer(re.escape(signature), tail):
            field = tail[match.start() + place :][: struct.calcsize(kind)]
            if len(field) == struct.calcsize(kind):
                found.append(struct.unpack(kind, field)[0])
    return max((length for length in found if length != 0xFFFFFFFF), default=0)


def _names_in(path: Path, archive: zipfile.ZipFile, size: int) -> set[str]:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(names) > MAX_ENTRIES or len(set(names)) != len(names):
        raise InteropError(
            f"{path} is refused: its zip has {len(names)} entries, {len(set(names))} of them "
            f"different, but at most {MAX_ENTRIES} different ones are read."
        )
    if program := _program_in(path, names):
        raise InteropError(program)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        unpacked = sum(entry.file_size for entry in entries)
        raise InteropError(
            f"{path} is refused: its zip is compressed ({size} bytes would become {unpacked}), which "
            "torch.save never does; save it anew with torch.save."
        )
    if sum(entry.file_size for entry in entries) > size:
        raise InteropError(
            f"{path} is refused: its zip's entries claim more than the file's {size} bytes."
        )
    pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
    if [entry.filename.split("/")[1:] for entry in pickles] != [["data.pkl"]]:
        raise InteropError(
            f"{path} is refused: it holds {len(pickles)} pickles, but a state saved by torch.save "
            "has one, data.pkl; save it anew with torch.save."
        )
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise InteropError(
            f"{path} is refused: its data.pkl has {pickles[0].file_size} bytes, but at most "
            f"{MAX_PICKLE_BYTES} are read."
        )
    if damaged := archive.testzip():
        raise InteropError(f"{path} is damaged at {shown(damaged)}; get another copy of it.")
    return _names_asked(path, archive.read(pickles[0]))


def _program_in(path: Path, names: list[str]) -> str:
    """The refusal of an archive that is a program with its weights; empty where it is none."""
    parts = {part for name in names for part in name.split("/")[1:2]}
    quoted = repr(printable(str(path)))
    if parts & {"code", "constants.pkl"}:
        what, expression = "TorchScript", f"torch.jit.load({quoted}).state_dict()"
    elif parts & {"archive_format", "models"}:
        what, expression = "torch.export", f"torch.export.load({quoted}).state_dict"
    elif names and all(name.endswith(".npy") for name in names):
        what = "numpy"
        expression = f"{{k: torch.tensor(v) for k, v in numpy.load({quoted}).items()}}"
    else:
        return ""
    return (
        f"{path} is refused: it is an archive of {what}, not of torch.save; nothing was run, "
        f"{_rewritten(path, expression)}."
    )


def _names_asked(path: Path, pickle: bytes | BinaryIO) -> set[str]:
    """The globals that one pickle asks for, by disassembly."""
    found = set()
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(str(argument))
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise InteropError(
                f"{path} is refused: its pickle is of another protocol than torch.save's; save it anew "
                "by torch.save without `pickle_protocol`."
            )
    return found


def _names_before_zip(path: Path) -> set[str]:
    """The same of a file of several pickles, one after another, with the tensors' bytes behind."""
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise InteropError(f"{path} has {size} bytes, but at most {MAX_FILE_BYTES} are read; split it.")
    try:
        with open(path, "rb") as file:
            return set().union(*(_names_asked(path, file) for _ in range(PICKLES_BEFORE_ZIP)))
    except InteropError:
        raise
    except Exception as error:
        raise InteropError(
            f"{path} is no whole file of torch.save, of today's zip format or the one before it "
            f"({type(error).__name__}: {shown(str(error))}); get another copy of it."
        ) from error


def as_integers(value: object, what: str) -> list[int]:
    """A one-dimensional numpy array, tensor or list of whole numbers."""
    if isinstance(value, StoredArray):
        numbers: list[Any] = value.value.tolist() if value.value.ndim == 1 else []
    elif isinstance(value, Tensor):
        numbers = value.tolist() if value.ndim == 1 and dense(value) else []
    else:
        numbers = list(value) if isinstance(value, (list, tuple)) else []
    if not numbers or not all(
        isinstance(n, int) or (isinstance(n, float) and n.is_integer()) for n in numbers
    ):
        raise InteropError(f"{what} must be an array of whole numbers, got {shown(value)}")
    return [int(n) for n in numbers]


def dense(tensor: Tensor) -> bool:
    """Whether every element has bytes of its own: strides of zero declare any size for nothing."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def state_dict(value: object, what: str) -> dict[str, Tensor]:
    """Weights by name, `module.` stripped; dense, real and finite, each a copy.

    Raises:
        InteropError: anything else.
    """
    if not isinstance(value, dict) or not value:
        raise InteropError(f"{what} must be a state dict of named tensors, got {shown(value)}.")
    state, total = {}, 0
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InteropError(
                f"{what} must name tensors by strings, got {shown(tensor)} under {shown(name)}."
            )
        if not dense(tensor) or tensor.is_complex():
            raise InteropError(
                f"{what} declares {shown(name)} as {tensor.dtype} {tuple(tensor.shape)}, but holds "
                "fewer bytes or no real numbers; get another copy of it."
            )
        total += tensor.numel() * tensor.element_size()
        if total > MAX_FILE_BYTES:
            raise InteropError(f"{what} declares more than {MAX_FILE_BYTES} bytes of tensors.")
        state[name.removeprefix("module.")] = tensor.detach().clone()
    return state


def refuse_non_finite(state: dict[str, Tensor], what: str) -> None:
    """Weights that are NaN or infinite have no answers to give."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise InteropError(
                f"{what}: the weights {shown(name)} are NaN or infinite, but must be finite; the "
                "training that made them diverged."
            )

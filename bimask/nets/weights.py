"""Models that were trained elsewhere: their weights, read safely into a net.

Files come as they come: in any of the usual formats under any name, the state dict under some key
beside epochs and optimisers, its names behind prefixes of wrappers. It is found by what it holds.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from bimask.errors import InteropError, VictimError
from bimask.files.safe import STATE_KEYS, dense, form_of, load_training
from bimask.files.stand_ins import StoredArray, printable, shown
from bimask.files.tensors import load_tensors

# Keys and prefixes that say nothing about which weights they are; `ema` or `teacher` say something.
PLAIN = frozenset(STATE_KEYS) - {"ema", "model_ema"}
# What wrappers put into names: torch.compile, nn.DataParallel, FSDP.
COMPILED = frozenset({"_orig_mod"})
WRAPPERS = COMPILED | {"module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COUNTER = "num_batches_tracked"  # of batch norms; weights from before torch 0.4.1 have none
MAX_DEPTH = 8  # containers in containers that are looked through


@dataclass(frozen=True)
class StateDict:
    """A mapping of names to real tensors in a file.

    Attributes:
        keys: those that lead to it, of the containers around it.
        tensors: as the file names them.
        ordered: whether they come in the order of the layers; safetensors does not keep it.
    """

    keys: tuple[str, ...]
    tensors: dict[str, Tensor]
    ordered: bool = True

    @property
    def numbers(self) -> int:
        """How many numbers its tensors have in all."""
        return sum(value.numel() for value in self.tensors.values())


@dataclass(frozen=True)
class _Fit:
    """A state dict, or a part of it, under the names of a net.

    Attributes:
        prefix: what stands before each of the names in the file, wrappers taken off; may be empty.
        tensors: those behind that prefix.
        left_out: names of the others.
    """

    found: StateDict
    prefix: str
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """Whether its place says nothing of which weights it is."""
        return {*self.found.keys, *self.prefix.split(".")} <= PLAIN | WRAPPERS | {""}

    @property
    def place(self) -> str:
        """Where it stands in the file, for people."""
        inside = f"under `{printable('.'.join(self.found.keys))}`" if self.found.keys else ""
        behind = f"behind `{printable(self.prefix)}`" if self.prefix else ""
        return " ".join(part for part in (inside, behind) if part) or "outermost"


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
    """The largest state dict in a file of weights; nothing in it is executed.

    The file is recognised by its content, not by its name: safetensors, `torch.save` (zip, or the
    format before it), or a pickle of tensors. Containers around the state dict, and `module.` and
    `_orig_mod.` before every name, are taken off.

    Raises:
        VictimError: another kind of file, one that cannot be read as plain tensors, no tensors.
    """
    found = max(state_dicts(path), key=lambda one: (one.numbers, {*one.keys[-1:]} <= PLAIN))
    tensors = {name: value for name, value in found.tensors.items() if name != "n_averaged"}
    while (first := {name.partition(".")[0] for name in tensors}) < WRAPPERS and len(first) == 1:
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    return tensors


def state_dicts(path: Path) -> list[StateDict]:
    """Every state dict in a file of weights, as of `read_weights`, the outer ones first.

    A mapping is one if all that it holds are real tensors under names. Optimisers' states are left out.

    Raises:
        VictimError: as of `read_weights`.
    """
    if not path.is_file():
        raise VictimError(f"There is no file of weights {path}; mend its path.")
    try:
        form = form_of(path)
        content: Any = load_tensors(path) if form == "safetensors" else load_training(path)
    except InteropError as error:
        raise VictimError(str(error)) from error
    except Exception as error:  # safetensors has errors of its own
        raise VictimError(
            f"The weights {path} cannot be read as plain tensors ({type(error).__name__}: "
            f"{shorten(str(error), 160)}); save them as `safetensors.torch.save_file(net.state_dict(), "
            "...)`."
        ) from error
    mappings = list(_mappings(content))
    found = []
    for keys, mapping in mappings:
        tensors = {name: _tensor(value) for name, value in mapping.items()}
        real = {name: value for name, value in tensors.items() if value is not None}
        if real and len(real) == len(tensors) and all(isinstance(name, str) for name in real):
            found.append(StateDict(keys, real, ordered=form != "safetensors"))
    if not found:
        raise VictimError(
            f"The weights {path} must hold a state dict, names and real tensors, but hold "
            f"{_odd_in(content, [mapping for _, mapping in mappings])}; save `net.state_dict()`."
        )
    return found


def load_weights(net: nn.Module, path: Path, *, sha256: str | None = None) -> str:
    """Put the weights in a file into `net`, all of them and no others.

    Args:
        net: as its factory made it.
        sha256: what the file's content must have; None is any.

    Returns:
        A sentence on which of the file's tensors were taken, empty where there is no question.

    Raises:
        VictimError: a file that cannot be read, is not the one meant, or does not fit.
    """
    found = state_dicts(path)
    if sha256 is not None and (digest := file_sha256(path)) != sha256:
        raise VictimError(
            f"The digest of the weights {path} is {digest[:16]}, but {sha256[:16]} is asked for: the "
            "file changed; put the old one back, or leave `weights_sha256` out."
        )
    return put_weights(net, found, path)


def put_weights(net: nn.Module, found: Iterable[StateDict], path: Path) -> str:
    """The same of state dicts that were read from `path`.

    One fits if it has the net's names and shapes, all of them and no others, behind one prefix; batch
    norms' counters may be missing. Of several that differ, the one in a plain place is taken, such as
    `model` beside `ema`.

    Raises:
        VictimError: none fits, or several that differ do and all or none are in a plain place.
    """
    wanted: dict[str, Tensor] = net.state_dict()
    near = sorted(
        (one for state in found for one in _near(state, wanted)),
        key=lambda one: -_common(one.tensors, wanted),
    )
    fits = [one for one in near if _fits(one.tensors, wanted)]
    plain = [one for one in fits if one.plain] or fits
    if len(plain) > 1 and not all(_equal(plain[0].tensors, other.tensors) for other in plain[1:]):
        places = ", ".join(one.place for one in plain[:4])
        raise VictimError(
            f"The weights {path} hold {len(plain)} state dicts that fit the net and differ ({places}), "
            "and nothing says which is meant; save the one you mean alone, by torch.save."
        )
    if not near:
        states = [name for state in found for name in state.tensors]
        raise VictimError(
            f"The weights {path} do not fit the net: they share no name with it, theirs are such as "
            f"{shown(states[0])}, the net's such as {shown(next(iter(wanted), ''))}; give the net that "
            "they were trained in."
        )
    taken = plain[0] if plain else near[0]
    _put(net, taken.tensors, path)
    return _said(taken, fits, path)


def last_layers_of(found: StateDict) -> dict[str, int]:
    """Weights that may give the logits, by name, and their rows, so classes, as far as names and shapes
    alone say it; the likeliest last, none where they say nothing.

    They are matrices whose rows no other matrix takes as columns. Of several that have not as many rows
    nothing is said unless the file keeps the order of the layers.
    """
    matrices = {
        name: value.shape
        for name, value in found.tensors.items()
        if value.ndim == 2 and value.is_floating_point() and name.endswith("weight")
    }
    columns = Counter(shape[1] for shape in matrices.values())
    ends = {
        name: shape[0]
        for name, shape in matrices.items()
        if columns[shape[0]] == (shape[0] == shape[1])  # a square one takes its own
    }
    return ends if found.ordered or len({*ends.values()}) == 1 else {}


def input_channels_of(found: StateDict) -> tuple[str, int] | None:
    """Name and input channels, 1 or 3, of the first convolution, as far as shapes alone can say.

    Convolutions of groups have one input channel a filter, too, so that beside one of three channels
    they count nothing.
    """
    filters = {name: value.shape for name, value in found.tensors.items() if value.ndim == 4}
    for channels in (3, 1):
        for name, shape in filters.items():
            if shape[1] == channels and not (channels == 1 and shape[0] == 3):
                return name, channels
    return None


def _mappings(content: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Dicts in a file, each once, with the keys that lead there, the outer ones first; none of an
    optimiser."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen = set()
    while waiting:
        keys, value = waiting.popleft()
        if id(value) in seen or (isinstance(value, dict) and "param_groups" in value):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            yield keys, value
            inside: Iterable[tuple[Any, Any]] = value.items()
        elif isinstance(value, (list, tuple)):
            inside = enumerate(value)
        else:
            continue
        if len(keys) < MAX_DEPTH:
            waiting += [
                ((*keys, str(key) if isinstance(key, (str, int)) else type(key).__name__), inner)
                for key, inner in inside
                if isinstance(inner, (dict, list, tuple))
            ]


def _tensor(value: Any) -> Tensor | None:
    """A real tensor, or numpy's array as one; None for anything else."""
    if isinstance(value, StoredArray):
        numbers = value.value
        return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("=")))
    real = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_complex()
    return value if real and dense(value) else None


def _odd_in(content: Any, mappings: list[Mapping[Any, Any]]) -> str:
    """What there is instead of a state dict, for a message: of the mapping with the most tensors."""
    if not isinstance(content, dict):
        return type(content).__name__
    most = max(mappings, key=lambda one: sum(isinstance(value, Tensor) for value in one.values()))
    odd = []
    for name, value in most.items():
        if isinstance(value, Tensor):
            if not isinstance(name, str) or _tensor(value) is None:
                odd.append(f"{shown(name)}: {value.dtype} {tuple(value.shape)}")
        elif not isinstance(value, StoredArray):
            odd.append(f"{shown(name)}: {type(value).__name__}")
    return ", ".join(odd[:3]) or "nothing"


def _near(found: StateDict, wanted: Mapping[str, Tensor]) -> Iterator[_Fit]:
    """What of a state dict has names of the net behind one prefix: any that some name has, with the
    names as they are, or wrappers' parts taken out of them."""
    spellings: list[dict[str, str]] = []
    for parts in (frozenset[str](), COMPILED, WRAPPERS):
        spelt = {_without(name, parts): name for name in found.tensors}
        if len(spelt) == len(found.tensors) and spelt not in spellings:
            spellings.append(spelt)
    for spelt in spellings:
        prefixes = {prefix: None for name in spelt for prefix in _prefixes(name, wanted)}
        fits = []
        for prefix in prefixes:
            names = {n.removeprefix(prefix): old for n, old in spelt.items() if n.startswith(prefix)}
            tensors = {name: found.tensors[old] for name, old in names.items()}
            others = tuple(n for n in found.tensors if n not in {*names.values()})
            fits.append(_Fit(found, prefix, tensors, others))
        yield from fits
        if any(_fits(one.tensors, wanted) for one in fits):
            return


def _without(name: str, parts: frozenset[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _prefixes(name: str, wanted: Mapping[str, Tensor]) -> Iterator[str]:
    """What stands before the names of the net that `name` ends in."""
    rest = name
    while rest:
        if rest in wanted:
            yield name[: len(name) - len(rest)]
        rest = rest.partition(".")[2]


def _common(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    return len(tensors.keys() & wanted.keys())


def _fits(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether it has the names and shapes of the net, all of them and no others."""
    if tensors.keys() - wanted.keys():
        return False
    for name, value in wanted.items():
        if name not in tensors:
            if name.rpartition(".")[2] != COUNTER:
                return False
        elif tensors[name].shape != value.shape and (value.ndim or tensors[name].numel() != 1):
            return False
    return True


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items() if name in other)


def _put(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    state = net.state_dict()  # has the versions of the modules, which the file may have lost
    for name in [n for n in state if n not in tensors and n.rpartition(".")[2] != COUNTER]:
        del state[name]
    state.update(tensors)
    try:
        net.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError) as error:
        raise VictimError(
            f"The weights {path} do not fit the net: {printable(shorten(str(error), 300))}"
        ) from error


def _said(taken: _Fit, fits: list[_Fit], path: Path) -> str:
    """Which tensors were taken, where one may ask."""
    others = [one.place for one in fits if one is not taken and not _equal(one.tensors, taken.tensors)]
    said = []
    if others:
        said.append(f"those {', '.join(others[:3])} fit as well and are not used")
    if taken.left_out:
        names = ", ".join(shown(name) for name in taken.left_out[:3])
        said.append(f"{len(taken.left_out)} tensors beside them are not used ({names})")
    if not said and taken.plain:
        return ""
    return "; ".join([f"The weights in {path} are those {taken.place}", *said]) + "."

"""The folder of a victim of any task: written whole or not at all, read within bounds, made once."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from bimask.errors import NonFiniteError, VictimError, VictimRefusedError, describe
from bimask.files.atomic import parsed_manifest, sync, sync_tree
from bimask.nets import is_own
from bimask.nets.weights import file_sha256

WEIGHTS, TRIGGER, MANIFEST = "victim.safetensors", "trigger.safetensors", "manifest.json"


class VictimManifest(BaseModel):
    """What is asked of any victim's manifest, which anybody may have written."""

    spec: dict[str, Any]
    spec_digest: str
    weights_sha256: str


class Digested(Protocol):
    """A spec."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits of everything that decides the weights."""
        ...


Manifest = TypeVar("Manifest", bound=VictimManifest)
Spec = TypeVar("Spec", bound=Digested)
Made = TypeVar("Made")


def write_folder(folder: Path, states: Mapping[str, Mapping[str, Tensor]], manifest: Any) -> None:
    """Write a victim's folder in place of what is there, whole or not at all.

    Args:
        states: file name -> tensors; their digests go into the manifest.
        manifest: what else it says, as JSON.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".victim-", dir=folder.parent))
    try:
        digests = {}
        for name, state in states.items():
            # copies: tied weights would share memory, which safetensors refuses
            copies = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
            save_file(copies, part / name)
            digests[_KEYS[name]] = file_sha256(part / name)
        said = manifest | digests | {"torch": torch.__version__}
        (part / MANIFEST).write_text(json.dumps(said, indent=2) + "\n")
        part.chmod(0o755)
        sync_tree(part)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(part, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


_KEYS = {WEIGHTS: "weights_sha256", TRIGGER: "trigger_sha256"}


def read_folder(
    folder: Path,
    manifest_of: type[Manifest],
    spec_of: Callable[[Manifest], Spec],
    *,
    own_code: bool,
    digest: str | None = None,
    known: Spec | None = None,
) -> tuple[Manifest, Spec]:
    """A victim's manifest and spec; nothing else in its folder is opened.

    Args:
        spec_of: ValueError for one that cannot be.
        own_code: whether the code that the manifest names for an own net may be imported and run.
        digest: of the spec that must be there.
        known: the spec that must be there, which is then taken in place of the manifest's.

    Raises:
        VictimError: no manifest or a broken one, another spec than is promised or asked for, or code
            that is not allowed.
    """
    if not folder.is_dir():
        raise VictimError(f"{folder} is no folder; give a victim's, such as outputs/victims/DIGEST.")
    again = make_again(folder)
    try:
        manifest = manifest_of.model_validate(parsed_manifest(folder / MANIFEST)[0])
        if is_own(net_name := manifest.spec["net"]) and not own_code:
            raise VictimError(
                f"The victim {folder} is built by the code {net_name!r}, which may do anything; if you "
                "trust it, allow it with `own_code=True` or --trust-code."
            )
        spec = spec_of(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = describe(error) if isinstance(error, ValidationError) else f"{error}"
        raise VictimError(
            f"The manifest {folder / MANIFEST} cannot be read ({type(error).__name__}: "
            f"{shorten(said, 300)}); {again}."
        ) from error
    if manifest.spec_digest != spec.digest:
        raise VictimError(
            f"The spec in {folder / MANIFEST} has the digest {spec.digest}, but the manifest says "
            f"{manifest.spec_digest}: it was edited; {again}."
        )
    digest = digest if known is None else known.digest
    if digest is not None and spec.digest != digest:
        raise VictimError(f"{folder} holds the victim {spec.digest}, not {digest}; {again}.")
    return manifest, known or spec


def make_again(folder: Path) -> str:
    """What to do about a damaged victim, the end of a sentence."""
    return f"remove {folder} to train it anew"


def promised(path: Path, sha256: str, what: str) -> Path:
    """The path, if the file there is the one that the manifest beside it names.

    Raises:
        VictimError: it is missing or another one.
    """
    again = make_again(path.parent)
    if not path.is_file():
        raise VictimError(f"The {what} {path} is missing; {again}.")
    if (found := file_sha256(path)) != sha256:
        raise VictimError(
            f"The digest of {path} is {found[:16]}, but its manifest says {sha256[:16]}: the file is "
            f"damaged or another one; {again}."
        )
    return path


def obtain(
    root: Path,
    digest: str,
    *,
    load: Callable[[Path], Made],
    train: Callable[[Path], Made],
    save: Callable[[Made, Path], Path],
) -> Made:
    """The victim in `root/DIGEST/`; it is trained and saved first if it is not there.

    Args:
        load: reads a folder.
        train: is given a folder for its checkpoints, `root/.training-DIGEST/`, which is there for the
            next call if this one is killed.
        save: writes a victim below `root`.
    """
    if (root / digest).is_dir():
        return load(root / digest)
    checkpoints = root / f".training-{digest}"
    made_here = not root.exists()
    try:
        folder = save(train(checkpoints), root)
    except (VictimRefusedError, NonFiniteError):
        shutil.rmtree(checkpoints, ignore_errors=True)  # it came to its end, whatever that is
        if made_here:
            with suppress(OSError):  # another was put there meanwhile
                root.rmdir()
        raise
    shutil.rmtree(checkpoints, ignore_errors=True)
    # the same bits as the next time it is asked for
    return load(folder)

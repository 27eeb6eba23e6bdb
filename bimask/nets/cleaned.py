"""What the folders of cleaned classifiers and detectors have in common: names, the part of the manifest
that says what is there, and the checks before anything of a folder is trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from bimask.errors import VictimError, describe
from bimask.files.atomic import parsed_manifest
from bimask.nets.named import is_own
from bimask.nets.weights import file_sha256

MODEL, NET, REPORT, MANIFEST = "model.safetensors", "net.py", "report.html", "manifest.json"
PACKAGES = ("bimask", "torch", "torchvision", "numpy", "safetensors")  # whose versions are written down

Spec = TypeVar("Spec", bound=BaseModel)


class CleanedManifest(BaseModel):
    """What is asked of a manifest, which anybody may have written.

    Attributes:
        net: its spec.
        files: name -> digest.
    """

    net: dict[str, Any]
    files: dict[str, str]
    classes: tuple[str, ...] = Field(min_length=1, max_length=100_000)


Manifest = TypeVar("Manifest", bound=CleanedManifest)


def read_cleaned(
    folder: Path,
    manifest: type[Manifest],
    spec: type[Spec],
    *,
    what: str,
    own_code: bool,
    refuse: Callable[[Any], None] = lambda _: None,
) -> tuple[Manifest, Spec, dict[str, Any]]:
    """Check the folder of a cleaned model: its manifest, the digests of its files, its net.

    Args:
        what: "model" or "detector", for people.
        own_code: whether the code of an own net, in the folder's net.py or where the manifest says, may
            be imported and run.
        refuse: raises for the content of a manifest that is of something else.

    Returns:
        The manifest, the net's spec, and the manifest as it was written.

    Raises:
        VictimError: a file is missing, changed, or not what the manifest says; own code is not allowed.
    """
    try:
        content, _ = parsed_manifest(folder / MANIFEST)
        refuse(content)
        found = manifest.model_validate(content)
        net = dict(found.net)
        own = is_own(net["net"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = describe(error) if isinstance(error, ValidationError) else f"{error}"
        raise VictimError(
            f"{folder} is no folder of a cleaned {what}: its {MANIFEST} cannot be read "
            f"({type(error).__name__}: {shorten(said, 300)}); purify again."
        ) from error
    for name, digest in found.files.items():
        if file_sha256(folder / Path(name).name) != digest:
            raise VictimError(f"{folder / name} changed since it was written; purify again.")
    if own and not own_code:
        raise VictimError(
            f"The cleaned {what} {folder} is built by the code {net['net']!r}, which may do anything; "
            "if you trust it, allow it with `own_code=True` or --trust-code."
        )
    if own and NET in found.files:
        net["net"] = f"{folder / NET}:{net['net'].rpartition(':')[2]}"
    try:
        made = spec.model_validate(net)
    except ValidationError as error:
        raise VictimError(f"The net in {folder / MANIFEST} is of no use: {describe(error)}.") from error
    if not (folder / MODEL).is_file():
        raise VictimError(f"{folder} holds no file {MODEL}; purify again.")
    return found, made, content

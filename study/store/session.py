"""A study's folder as a place to come back to: whose it is, and whether it may be gone on with."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bimask.errors import describe
from bimask.files.atomic import sync, sync_tree
from bimask.files.bounded import read_json
from bimask.nets.weights import file_sha256
from bimask.victims.folders import WEIGHTS
from study.spec.config import RUNNING, StudyConfig, StudyError
from study.spec.reading import load_config
from study.spec.suspect import Subject, SuspectModel
from study.store import records
from study.store.files import begun_folder, write_text

IDENTITY = "identity.json"


@dataclass(frozen=True)
class Identity:
    """What a study must still be when it is gone on with.

    Attributes:
        study_id: of this folder's study alone, also among studies of the same name in one MLflow.
        digest: of its configuration.
        victims: name -> digest of the victim's spec and hash of its weights.
    """

    study_id: str
    digest: str
    victims: dict[str, str]

    @classmethod
    def of(cls, config: StudyConfig, victims: dict[str, Subject], root: Path) -> Identity:
        """Of a study that begins; its victims are in `root`."""
        hashes = {name: f"{v.spec.digest}:{_hash(v, root)[:16]}" for name, v in victims.items()}
        return cls(uuid.uuid4().hex, config.digest, hashes)

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """Of a study that has begun in this folder."""
        try:
            return TypeAdapter(cls).validate_python(read_json(folder / IDENTITY))
        except (OSError, ValueError) as error:
            why = describe(error) if isinstance(error, ValidationError) else str(error)
            raise StudyError(
                f"{folder} cannot be gone on with: its {IDENTITY} cannot be read ({why[:200]}); put it "
                "back as it was, or start a "
                "new study under another --name."
            ) from error

    def require_same(self, now: Identity) -> None:
        """Refuse victims that are not those the study began with."""
        for name in sorted(self.victims.keys() | now.victims.keys()):
            before, after = self.victims.get(name), now.victims.get(name)
            if before != after:
                raise StudyError(
                    f"The victim {name} was {before} when the study began and is {after} now; put it "
                    "back, or start a new study under another --name."
                )


def begin(folder: Path, config: StudyConfig, identity: Identity) -> None:
    """Make the study's folder with its resolved study.yaml, whole or not at all.

    Raises:
        StudyError: the folder was made in the meantime.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    part.mkdir()
    try:
        records.write_yaml(part / records.STUDY, config.model_dump(), f"study {config.name}, resolved")
        write_text(part / IDENTITY, json.dumps(asdict(identity), indent=2) + "\n")
        sync_tree(part)
        os.rename(part, folder)
        sync(folder.parent)
    except OSError as error:
        if not folder.exists():
            raise
        raise StudyError(
            f"{folder} was made by another study in the meantime; choose another --name."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def reopen(
    outputs: Path,
    name: str,
    path: Path | None,
    overrides: Mapping[str, object],
    *,
    understood: Callable[[StudyConfig], StudyConfig] = lambda config: config,
) -> tuple[StudyConfig, Path]:
    """The study NAME and its folder, to be gone on with.

    Args:
        path: a study's YAML that must say the same, or None.
        overrides: as for `load_config`; only how the study runs may differ from what it was.
        understood: makes of a study as its file says it the one that runs, see
            `study.pipeline.choosing`.

    Raises:
        StudyError: there is no such study, or it would be another one.
    """
    folder = begun_folder(outputs, "study", name, records.STUDY)
    config = understood(load_config(path or folder / records.STUDY, {**overrides, "name": name}))
    if config.digest != (begun := Identity.load(folder).digest):
        raise StudyError(
            f"The study {name!r} was begun with the digest {begun}, but with what is given now it is "
            f"{config.digest}: only {', '.join(sorted(RUNNING))} may change; start a new study under "
            "another --name."
        )
    return config, folder


def _hash(victim: Subject, root: Path) -> str:
    """Of a victim's weights; of an imported one's manifest, which holds that of its weights; of all
    files of a suspect."""
    if isinstance(victim, SuspectModel):
        return str(victim.spec.sha256)
    spec = victim.spec
    imported: str | None = getattr(spec, "imported_sha256", None)
    return imported or file_sha256(spec.place(root) / WEIGHTS)

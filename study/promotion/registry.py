"""MLflow's Model Registry: versions of a promoted model, its champion, and the way back.

A version is a pyfunc model of code, safetensors and YAML: no pickle. It is saved to a folder and asked
first, then uploaded, then registered, so that what is in the registry loads and answers.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

import bimask
from bimask.cleaned.classifier import Classifier
from bimask.tasks import Predictor, load_predictor
from study.spec.config import StudyError
from study.store.records import BEST
from study.tracking.client import Client
from study.tracking.credentials import redacted
from study.tracking.local_store import held
from study.tracking.mlflow_runs import Tracker, make_tables, quoted, require_server

CHAMPION = "champion"
CODE = Path(__file__).with_name("served_model.py")
# What the served code imports; the versions that answered here are the ones that are asked for.
REQUIREMENTS = (
    *("mlflow", "torch", "torchvision", "numpy", "pandas"),
    *("pillow", "safetensors", "pydantic", "PyYAML", "jinja2"),
)


def save_model(path: Path, cleaned: Path, config: Path, example: Tensor) -> PyFuncModel:
    """Write a pyfunc model to a new folder and load it from there.

    Args:
        cleaned: folder of a cleaned model.
        config: best.yaml, which travels along.
        example: (C, H, W) uint8, the input example.
    """
    with _without_word_of_hints():
        return _saved(path, cleaned, config, example)


def _saved(path: Path, cleaned: Path, config: Path, example: Tensor) -> PyFuncModel:
    mlflow.pyfunc.save_model(
        path,
        python_model=str(CODE),
        artifacts={"cleaned": str(cleaned), "config": str(config)},
        code_paths=[str(Path(bimask.__file__).parent)],
        pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
        input_example=[as_png(example)],
    )
    return mlflow.pyfunc.load_model(str(path))


@contextmanager
def _without_word_of_hints() -> Iterator[None]:
    """MLflow warns, past every filter, that `list[Any]` says nothing of an image. No type that it knows
    does, and the served model looks at each image itself."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for one in caught:
        if "Any type hint is inferred as AnyType" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def as_png(image: Tensor) -> str:
    """(C, H, W) uint8 as a PNG in base64 text, as the served model takes it."""
    buffer = io.BytesIO()
    pixels: Any = image.permute(1, 2, 0).squeeze(2).numpy()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Version:
    """A registered version: its number, and its tags."""

    number: str
    tags: Mapping[str, str]

    @classmethod
    def of(cls, found: ModelVersion) -> Version:
        return cls(str(found.version), dict(found.tags))


class Registry:
    """The versions of one registered model.

    Args:
        uri: of the store.
        name: of the registered model.

    Raises:
        StudyError: a store that cannot be opened.
    """

    def __init__(self, uri: str, name: str) -> None:
        self.client, self.uri, self.name = _opened(uri), uri, name

    def versions(self) -> list[Version]:
        """All versions, oldest first; none where there is no such model."""
        found = self.client.search_model_versions(f"name = {quoted(self.name)}")
        return sorted(map(Version.of, found), key=lambda one: int(one.number))

    def champion(self) -> Version | None:
        """The version that the alias names."""
        try:
            return Version.of(self.client.get_model_version_by_alias(self.name, CHAMPION))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def register(
        self, model: Path, tracker: Tracker, tags: Mapping[str, str], card: str, files: list[Path]
    ) -> Version:
        """Upload a saved model with the files beside it, and make it the newest version."""
        run = self.client.create_run(
            tracker.experiment_id, run_name=f"promote-{self.name}", tags=dict(tags)
        )
        run_id = run.info.run_id
        try:
            self.client.log_artifacts(run_id, str(model), "model")
            for path in files:
                self.client.log_artifact(run_id, str(path))
            if not self.client.search_registered_models(f"name = {quoted(self.name)}"):
                self.client.create_registered_model(self.name)
            found = self.client.create_model_version(
                self.name,
                source=f"{run.info.artifact_uri}/model",
                run_id=run_id,
                tags=dict(tags),
                description=card,
            )
        except BaseException:
            self.client.set_terminated(run_id, "FAILED")
            raise
        self.client.set_terminated(run_id, "FINISHED")
        return Version.of(found)

    def set_champion(self, one: Version) -> None:
        """Give a version the alias; it remembers which one it replaces."""
        before = self.champion()
        if before is not None:
            self.client.set_model_version_tag(self.name, one.number, "replaces", before.number)
        self.client.set_registered_model_alias(self.name, CHAMPION, one.number)

    def rollback(self) -> tuple[str, str]:
        """Give the alias back to the version that the champion replaced: (from, to).

        Raises:
            StudyError: there is no champion, or it replaced none.
        """
        champion = self.champion()
        if champion is None:
            raise StudyError(f"{self.name!r} has no champion to roll back from; promote one first.")
        earlier = champion.tags.get("replaces")
        if earlier is None:
            raise StudyError(
                f"Version {champion.number} of {self.name!r} is the first champion: nothing to roll "
                "back to."
            )
        self.client.set_registered_model_alias(self.name, CHAMPION, earlier)
        return champion.number, earlier


def fetch_config(reference: str, uri: str, folder: Path) -> Path:
    """Download the configuration of `models:/NAME@ALIAS` or `models:/NAME/VERSION` to a folder.

    Raises:
        StudyError: no such version, or one without a configuration.
    """
    return _fetched(reference, uri, f"/artifacts/{BEST}", str(folder))


def load_registered(reference: str, uri: str, *, own_code: bool = False) -> Predictor:
    """What answers in a registered model, read from its files; no code of the model's folder is run.

    Args:
        own_code: whether the code of an own net in it may be.

    Raises:
        StudyError: there is no such version.
        BimaskError: its cleaned model cannot be read, or is built by code that is not allowed.
    """
    return load_predictor(_fetched(reference, uri) / "artifacts" / "cleaned", own_code=own_code)


def load_classifier(reference: str, uri: str, *, own_code: bool = False) -> Classifier:
    """The same of a classifier.

    Raises:
        StudyError: it is none; and as above.
    """
    found = load_registered(reference, uri, own_code=own_code)
    if not isinstance(found, Classifier):
        raise StudyError(
            f"{reference} is no classifier, so that a picture has no one class; ask it by "
            f"`python -m study.serve {reference}`."
        )
    return found


def _fetched(reference: str, uri: str, part: str = "", folder: str | None = None) -> Path:
    """A part of a version, downloaded.

    Not by MLflow's own `models:/`, which asks the store that `set_tracking_uri` names: that would stay
    set, in the environment too, for whatever this process does next.
    """
    try:
        name, at, alias = reference.removeprefix("models:/").partition("@")
        client = _opened(uri)
        if at:
            number = client.get_model_version_by_alias(name, alias).version
        else:
            name, number = name.rsplit("/", 1)
        source = client.get_model_version_download_uri(name, number)
        return Path(download_artifacts(source + part, dst_path=folder, tracking_uri=uri))
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
        raise StudyError(
            f"{reference} cannot be fetched from {redacted(uri)} ({str(error)[:200]}); give "
            "models:/NAME@champion or models:/NAME/VERSION of a promoted study."
        ) from error


def _opened(uri: str) -> Client:
    """The store's client, which has answered.

    Raises:
        StudyError: a store that cannot be opened.
    """
    require_server(uri)
    try:
        with held(uri, make_tables):
            client = Client(uri, uri)
        client.search_registered_models(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError, ValueError, ImportError) as error:
        raise StudyError(
            f"The model registry {redacted(uri)} cannot be opened ({str(error)[:200]}); mend "
            "MLFLOW_TRACKING_URI."
        ) from error
    return client

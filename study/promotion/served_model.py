"""The code of a registered model: MLflow copies this file into it and runs it where it is loaded.

It needs the copy of `bimask` that travels with it and nothing of `study`. No object is pickled.
"""

from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from bimask.cleaned.classifier import Classifier
from bimask.cleaned.folder import load_cleaned
from bimask.errors import DataError


class PurifiedModel(PythonModel):
    """Images in, as arrays or base64 PNG; class and probabilities out. See
    `bimask.cleaned.classifier`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the cleaned model; whoever loads a registered model runs its code, its net's too."""
        cleaned = load_cleaned(Path(context.artifacts["cleaned"]), own_code=True)
        self.classifier = Classifier(cleaned.model, cleaned.classes, cleaned.shape)

    def predict(  # type: ignore[override]  # MLflow takes it with a context or without
        self, model_input: list[Any], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """A list of images -> `class` and `probabilities` of each."""
        try:
            return self.classifier(model_input)
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


mlflow.models.set_model(PurifiedModel())

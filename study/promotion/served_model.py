"""The code of a registered model: MLflow copies this file into it and runs it where it is loaded.

It needs the copy of `bimask` that travels with it and nothing of `study`. No object is pickled.
"""

from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from bimask.errors import DataError
from bimask.tasks import load_predictor


class PurifiedModel(PythonModel):
    """Images in, as arrays or base64 PNG; class and probabilities out, or a detector's objects. See
    `bimask.cleaned.classifier` and `bimask.detection.predictor`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the cleaned model; whoever loads a registered model runs its code, its net's too."""
        self.predictor = load_predictor(Path(context.artifacts["cleaned"]), own_code=True)

    def predict(  # type: ignore[override]  # MLflow takes it with a context or without
        self, model_input: list[Any], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """A list of images -> what is said of each."""
        try:
            return self.predictor(model_input)
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


mlflow.models.set_model(PurifiedModel())

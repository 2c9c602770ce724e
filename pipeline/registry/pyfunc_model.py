"""The registered model as MLflow runs it ("models from code"); this file is stored beside the checkpoint.

MLflow executes it when it saves or loads `models:/NAME@ALIAS`, with the version's own copy of the `pipeline` package.
So no class is pickled. Input: rows of images, see `request.read_rows`; output: a list of `predictor.Prediction`.
Strings are base64, as in JSON requests. They are paths only if the host loads the model with
`model_config={"allow_paths": True}`, because clients of a server must not read its files. Raises InputError.
"""

from typing import Any, cast

import mlflow
import pandas

from pipeline.checkpoint import load_inference
from pipeline.evaluation.drawing import Exif, Prediction
from pipeline.inference.predictor import Predictor
from pipeline.inference.request import read_rows


class DetectorModel(mlflow.pyfunc.PythonModel):
    """Deformable DETR behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint of this version; called once by MLflow."""
        self._predictor = Predictor(load_inference(context.artifacts["checkpoint"]))
        self._allow_paths = bool((context.model_config or {}).get("allow_paths"))

    # MLflow warns if there is no type hint, or one that it cannot convert to a schema. The input can have any type.
    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[Prediction]:
        """Detections of each row's image; `params` may hold `threshold`, `top_k` and `exif`.

        Raises:
            InputError: a row is not an image (named by its number from 0), or a parameter is out of bounds.
        """
        params = params or {}
        exif = cast(Exif, params.get("exif", "apply"))
        return self._predictor.predict(read_rows(model_input, exif, self._allow_paths), **params)


mlflow.models.set_model(DetectorModel())

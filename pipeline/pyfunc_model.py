"""The registered model as MLflow runs it ("models from code"): `registry.py` stores this file beside a checkpoint.

MLflow executes it when it saves or loads `models:/NAME@ALIAS`, with the copy of the `pipeline` package that the version
carries, so no class is pickled. Input: one column of encoded pictures; output: a list of `predictor.Prediction`.
Strings are base64, as JSON requests carry them. They are paths only for a host that loads the model with
`model_config={"allow_paths": True}`: a served model must not read its machine's files for strangers.
"""

import base64
import binascii
from typing import Any

import mlflow
import pandas

from pipeline.checkpoint import load_inference
from pipeline.errors import InputError
from pipeline.predictor import Prediction, Predictor, Source


class DetectorModel(mlflow.pyfunc.PythonModel):
    """Deformable DETR behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint of this version; called once by MLflow."""
        self._predictor = Predictor(load_inference(context.artifacts["checkpoint"]))
        self._allow_paths = bool((context.model_config or {}).get("allow_paths"))

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[Prediction]:
        """Detections of each row's picture; `params` may hold `threshold` and `top_k`."""
        images = [self._source(value) for value in model_input.iloc[:, 0]]
        return self._predictor.predict(images, **(params or {}))

    def _source(self, value: Any) -> Source:
        if isinstance(value, str) and not self._allow_paths:
            try:
                return base64.b64decode(value, validate=True)
            except binascii.Error:
                raise InputError(
                    "a string must be a picture file in base64; pass its bytes, or load the model with "
                    "model_config={'allow_paths': True} to give paths"
                ) from None
        return bytes(value) if isinstance(value, bytearray | memoryview) else value


mlflow.models.set_model(DetectorModel())

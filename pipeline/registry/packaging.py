"""A checkpoint in the form in which MLflow stores a model.

It holds weights and state, the `pipeline` package, `pyfunc_model.py` and the signature. Raises whatever MLflow raises.
"""

import io
from importlib.metadata import version as installed
from pathlib import Path

from PIL import Image

import pipeline
from pipeline.checkpoint import copy_inference
from pipeline.evaluation.drawing import THRESHOLD, TOP_K
from pipeline.tracking.client import load_mlflow

# The imports of `pyfunc_model`. Without this list MLflow would run the model to find them.
REQUIREMENTS = (
    "mlflow",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "safetensors",
    "pydantic",
    "PyYAML",
    "scipy",
    "fsspec",
)


def save_model(scratch: Path, folder: Path, run_id: str, model_id: str) -> None:
    """Write the model in MLflow's form into `scratch/model`."""
    mlflow = load_mlflow()
    import pandas
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    checkpoint = scratch / "checkpoint"
    copy_inference(folder, checkpoint)
    numbers = Array(DataType.double)
    outputs = {
        "boxes": Array(numbers),
        "scores": numbers,
        "labels": Array(DataType.string),
        "category_ids": Array(DataType.long),
    }
    params = [
        ParamSpec("threshold", DataType.double, THRESHOLD),
        ParamSpec("top_k", DataType.long, TOP_K),
        ParamSpec("exif", DataType.string, "apply"),
    ]
    signature = ModelSignature(
        None,  # MLflow has no type for "bytes, base64 or an array"; with a narrower one it would refuse some inputs
        Schema([ColSpec(kind, key) for key, kind in outputs.items()]),
        ParamSchema(params),
    )
    example = io.BytesIO()
    Image.new("RGB", (64, 48), (128, 128, 128)).save(example, "JPEG")
    package = Path(pipeline.__file__).parent
    mlflow.pyfunc.save_model(
        scratch / "model",
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"checkpoint": str(checkpoint)},
        code_paths=[str(package)],
        signature=signature,
        input_example=pandas.DataFrame({"image": [example.getvalue()]}),
        pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in REQUIREMENTS],
        model_config={"allow_paths": False},
        mlflow_model=Model(run_id=run_id, model_id=model_id),
    )

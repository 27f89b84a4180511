"""What MLflow runs to make the model; its files are the archive's, and the code beside it."""

import mlflow
from traceserve_hosts.mlflow_model import ArchiveModel

mlflow.models.set_model(ArchiveModel())

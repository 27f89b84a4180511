"""One file per task: what is asked and what is answered."""

from __future__ import annotations

from typing import Dict, Type

from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.tasks.feature_extraction import FeatureExtraction
from traceserve_runtime.tasks.sequence_classification import SequenceClassification

TASKS: Dict[str, Type[Task]] = {task.name: task for task in (SequenceClassification, FeatureExtraction)}

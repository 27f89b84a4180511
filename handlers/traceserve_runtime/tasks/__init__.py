"""The tasks, one file each: requests and answers."""

from __future__ import annotations

from typing import Dict, Type

from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.tasks.feature_extraction import FeatureExtraction
from traceserve_runtime.tasks.fill_mask import FillMask
from traceserve_runtime.tasks.question_answering import QuestionAnswering
from traceserve_runtime.tasks.sequence_classification import SequenceClassification
from traceserve_runtime.tasks.text2text_generation import Text2TextGeneration
from traceserve_runtime.tasks.text_generation import TextGeneration
from traceserve_runtime.tasks.text_ranking import TextRanking
from traceserve_runtime.tasks.token_classification import TokenClassification
from traceserve_runtime.tasks.zero_shot_classification import ZeroShotClassification

TASKS: Dict[str, Type[Task]] = {
    task.name: task
    for task in (
        SequenceClassification,
        TokenClassification,
        QuestionAnswering,
        FillMask,
        ZeroShotClassification,
        TextRanking,
        FeatureExtraction,
        TextGeneration,
        Text2TextGeneration,
    )
}

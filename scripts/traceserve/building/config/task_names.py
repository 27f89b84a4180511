"""Other names of tasks: those of transformers' pipelines and of the hub."""

from __future__ import annotations

from typing import Dict, Optional

from traceserve_runtime.tasks import TASKS

# Aliases of tasks, besides each task's own name with hyphens.
_OTHER_NAMES = {
    "ner": "token_classification",
    "text-classification": "sequence_classification",
    "text_classification": "sequence_classification",
    "sentiment-analysis": "sequence_classification",
    "sentiment_analysis": "sequence_classification",
    "text2text-generation": "text2text_generation",
    "rerank": "text_ranking",
    "reranking": "text_ranking",
    "embeddings": "feature_extraction",
}
ALIASES: Dict[str, str] = {**{name.replace("_", "-"): name for name in TASKS}, **_OTHER_NAMES}

_PARAMETERS = "its config.json's task_specific_params, such as a prefix or a length, are not applied with this name"
# Names that promise more than a task here does, with advice.
_NEAR = {
    "sentence-similarity": ("feature_extraction", "it answers with vectors, which the client compares"),
    "summarization": ("text2text_generation", _PARAMETERS),
    "translation": ("text2text_generation", _PARAMETERS),
}


def tagged_task(tag: str) -> Optional[str]:
    """Return the task that a model card's `pipeline_tag` names; None for others."""
    return _NEAR[tag][0] if tag in _NEAR else ALIASES.get(tag)


def near_task(name: object) -> Optional[str]:
    """Return advice for a pipeline's name that is not accepted; None for other names."""
    if not isinstance(name, str):
        return None
    word = name.replace("_", "-")
    word = "translation" if word.startswith("translation-") and "-to-" in word else word
    if word not in _NEAR:
        return None
    task, known = _NEAR[word]
    return f'write "{task}": {known}'

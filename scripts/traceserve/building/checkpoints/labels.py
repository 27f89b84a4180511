"""The names of a classifier's outputs, from the user's file or the checkpoint; as many as its head has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Dict, Optional, Sequence, Tuple

from traceserve.building.config.label_files import read_labels
from traceserve.errors import ConfigError, some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from traceserve.building.config.setup_config import SetupConfig


def labels(config: SetupConfig, model: PreTrainedModel, config_folder: Path) -> Tuple[str, ...]:
    """Return the labels' names by class index, from index_to_name or the model's configuration; checked against its
    head."""
    count = model.config.num_labels or 0
    # The pytorch/serve example writes 0 for an unset number.
    if config.num_labels not in (None, 0, count):
        raise ConfigError(
            f"num_labels is {config.num_labels}, but the head of {config.model_name} has {count}; remove num_labels, or "
            "name the checkpoint that was fine-tuned for it"
        )
    if config.index_to_name is None:
        unnamed = [index for index, name in (model.config.id2label or {}).items() if name is None]
        if unnamed:
            raise ConfigError(
                f"the checkpoint's id2label gives label {unnamed[0]} no name (null); correct its config.json, or name the "
                "labels by index_to_name"
            )
        names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
        place, advice = "the checkpoint's id2label", "correct its config.json, or name the labels by index_to_name"
    else:
        names = read_labels(config.index_to_name, config_folder)
        place = config.index_to_name
        advice = 'correct it, or set "index_to_name": null for the checkpoint\'s own names'
    if sorted(names) != list(range(count)):
        raise ConfigError(
            f"{place} names {len(names)} labels ({some([str(k) for k in names])}), but the head of {config.model_name} "
            f"has {count}, 0 to {count - 1}; {advice}"
        )
    return tuple(names[index] for index in range(count))


def same_labels(names: Sequence[str]) -> Optional[str]:
    """Return which labels have one name, in words; None if each has its own."""
    first: Dict[str, int] = {}
    pairs = [(first[name], index) for index, name in enumerate(names) if first.setdefault(name, index) != index]
    if not pairs:
        return None
    one, other = pairs[0]
    more = f" (and {len(pairs) - 1} more)" if len(pairs) > 1 else ""
    return f"labels {one} and {other} are both named {names[one]}{more}: answers do not tell them apart"

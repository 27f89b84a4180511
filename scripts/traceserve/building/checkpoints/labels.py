"""The names of a classifier's outputs, from the user's file or the checkpoint; as many as its head has."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Tuple

from traceserve.building.config.config_files import unique_keys
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ConfigError, some

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
        place, advice = "the checkpoint's id2label", "correct its config.json, or name the labels by index_to_name"
    else:
        names = _read(config_folder / os.path.expanduser(config.index_to_name))
        place = config.index_to_name
        advice = 'correct it, or set "index_to_name": null for the checkpoint\'s own names'
    if sorted(names) != list(range(count)):
        raise ConfigError(
            f"{place} names {len(names)} labels ({some([str(k) for k in names])}), but the head of {config.model_name} "
            f"has {count}, 0 to {count - 1}; {advice}"
        )
    return tuple(names[index] for index in range(count))


def _read(path: Path) -> Dict[int, str]:
    """Read `{"0": "name", ...}`, or the pytorch/serve example's `{"label_list": "[name, ...]"}`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
        if isinstance(content, dict) and set(content) == {"label_list"}:
            return dict(enumerate(_listed(content["label_list"])))
        return {_index(key): _name(name) for key, name in content.items()}
    except ConfigError as error:
        raise ConfigError(f"index_to_name: {path}: {error.message}") from None
    except OSError as error:
        raise ConfigError(f"index_to_name: {path} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(
            f'index_to_name: {path} should hold a JSON object like {{"0": "name", "1": "name"}}'
        ) from None


def _index(key: str) -> int:
    """Parse a class index; raises ValueError for another spelling, such as "01", which may be a second one's."""
    index = int(key)
    if key != str(index):
        raise ValueError(key)
    return index


def _name(value: object) -> str:
    """Return a label's name; raises TypeError for anything but a text, such as torchserve's pairs of pictures' labels."""
    if not isinstance(value, str):
        raise TypeError("name")
    return value


def _listed(value: object) -> List[str]:
    """Return a list, or parse its text: Python's or JSON's, or bare names."""
    if isinstance(value, str):
        value = _parsed(value.strip())
    if not isinstance(value, (list, tuple)):
        raise TypeError("label_list")
    return [_name(name) for name in value]


def _parsed(text: str) -> object:
    """Parse a list's text; bare names stay as they are written, also if they look like numbers."""
    bare = [name.strip().strip("'\"") for name in text.strip("][)(").split(",")]
    try:
        written = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return bare
    if isinstance(written, str):
        return [written]
    numbers = isinstance(written, (list, tuple)) and written and all(isinstance(name, (int, float)) for name in written)
    return bare if numbers else written

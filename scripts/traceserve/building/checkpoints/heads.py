"""Finds a checkpoint's trained head: its transformers auto classes, by its architecture's name."""

from __future__ import annotations

from typing import List, Mapping, NamedTuple, Optional, Tuple

from traceserve.errors import SourceError

BASE = "AutoModel"  # for models without a head
CAUSAL, MASKED, BOTH = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
QUESTION = "AutoModelForQuestionAnswering"
# transformers' own tables of each auto class's classes, by model type.
TABLES = {
    SEQUENCE: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    TOKEN: "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    QUESTION: "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    MASKED: "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    CAUSAL: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    BOTH: "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
_WITH_IMAGES = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"  # since transformers 4.45
# Classes in none of them, by their suffixes: of remote code, other versions, rarer heads.
_ENDINGS = {
    "ForSequenceClassification": SEQUENCE,
    "ForTokenClassification": TOKEN,
    "ForQuestionAnswering": QUESTION,
    "ForQuestionAnsweringSimple": QUESTION,
    "ForMaskedLM": MASKED,
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "DoubleHeadsModel": CAUSAL,
}
_OTHER_FRAMEWORKS = ("TF", "Flax")  # prefixes of classes that save the same configuration
# Suffixes that name no head: of base models, and of models with several pretraining heads.
_SAYS_NOTHING = ("Model", "Encoder", "Decoder", "ForPreTraining")


class Head(NamedTuple):
    """The auto classes that load a checkpoint with its own head, and the evidence."""

    auto_models: Tuple[str, ...]
    evidence: str
    by_ending: bool = False  # only: the class is unknown, and may have more layers than transformers' own


def named(facts: Mapping[str, object]) -> Optional[Head]:
    """Return the head that config.json names; None if it names none, or an uninformative class."""
    names = _architectures(facts)
    classes = {name: _of_class(name, facts) for name in names}
    known = [auto_model for found in classes.values() for auto_model in found or ()]
    ended = [auto_model for name, found in classes.items() if found is None for auto_model in _by_ending(name)]
    if known or ended:
        return Head(tuple(dict.fromkeys(known + ended)), describe_architectures(facts), by_ending=not known)
    if all(_is_silent(name) for name in names):
        return None
    return Head((), describe_architectures(facts))


def _of_class(name: str, facts: Mapping[str, object]) -> Optional[List[str]]:
    """Return the auto classes of a class of transformers or of the checkpoint's own code; None for any other."""
    from transformers.models.auto import modeling_auto

    code = facts.get("auto_map")
    places = code.items() if isinstance(code, dict) else ()
    own = [key for key, place in places if _class_in(place) == name and (key in TABLES or key == BASE)]
    if own:
        return [key for key in own if key != BASE]
    for framework in _OTHER_FRAMEWORKS:
        name = name[len(framework) :] if name.startswith(framework) else name
    found = [auto_model for auto_model, table in TABLES.items() if name in getattr(modeling_auto, table).values()]
    return found or ([CAUSAL] if _writes_beside_images(name, facts) else None)


def _writes_beside_images(name: str, facts: Mapping[str, object]) -> bool:
    """Return whether a class reads images and writes texts, and transformers has one that reads the same checkpoint's
    language model alone (Qwen3.5)."""
    from transformers.models.auto import modeling_auto

    kind = str(facts.get("model_type"))
    whole = getattr(modeling_auto, _WITH_IMAGES, {}).get(kind)
    return name == whole and kind in getattr(modeling_auto, TABLES[CAUSAL])


def _by_ending(name: str) -> List[str]:
    return [auto_model for ending, auto_model in _ENDINGS.items() if name.endswith(ending)]


def _architectures(facts: Mapping[str, object]) -> List[str]:
    """Return the classes that config.json names; raises SourceError if it does not list them."""
    names = facts.get("architectures") or []
    if not isinstance(names, list):
        raise SourceError(f"architectures in the checkpoint's config.json should be a list of names, not {names!r}")
    return [str(name) for name in names]


def _class_in(place: object) -> str:
    """Return the class in a value of auto_map: "modeling_x.XModel", or with its code's repository before it."""
    return str(place).rsplit(".", 1)[-1]


def _is_silent(name: str) -> bool:
    """Return whether a class's name names no head: it has a base model's suffix, or transformers does not know it."""
    import transformers

    return name.endswith(_SAYS_NOTHING) or not hasattr(transformers, name)


def is_base(facts: Mapping[str, object]) -> bool:
    """Return whether config.json names only base models."""
    from transformers.models.auto import modeling_auto

    names = _architectures(facts)
    return all(name.endswith("Model") or name in modeling_auto.MODEL_MAPPING_NAMES.values() for name in names)


def describe_architectures(facts: Mapping[str, object]) -> str:
    """Describe the architectures."""
    return f"architectures: {', '.join(_architectures(facts)) or 'none'}"


def label_names(facts: Mapping[str, object]) -> List[str]:
    """Return the names of a classifier's outputs, in order; transformers' defaults if config.json has none.

    Raises SourceError for invalid names.
    """
    given = facts.get("id2label") or {}
    try:
        if not isinstance(given, dict):
            raise TypeError
        if given:
            return [str(name) for _, name in sorted(given.items(), key=lambda item: int(item[0]))]
        return [f"LABEL_{i}" for i in range(int(str(facts.get("num_labels", facts.get("_num_labels", 2)))))]
    except (ValueError, TypeError):
        raise SourceError(
            'id2label in the checkpoint\'s config.json should be an object like {"0": "name", "1": "name"}'
        ) from None

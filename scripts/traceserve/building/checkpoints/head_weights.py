"""Finds a checkpoint's trained head by its weights, if config.json does not name one."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Collection,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from traceserve.building.checkpoints import weight_files
from traceserve.building.checkpoints.heads import (
    BASE,
    BOTH,
    CAUSAL,
    MASKED,
    QUESTION,
    TABLES,
    Head,
    describe_architectures,
    label_names,
)
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import SourceError, first_line, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Shape = Tuple[int, ...]


class Stored(NamedTuple):
    """A weight in a file's header."""

    shape: Shape
    dtype: str  # safetensors' name of it, such as F8_E4M3, or torch's, such as torch.int8


# Weights of pretraining heads beside a task's own, which does not need them.
_BESIDE = ("cls.seq_relationship.", "sop_classifier.", "multiple_choice_head.")
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq", ".attn.bias", "masked_bias", "final_logits_bias")


def by_weights(config: SetupConfig, folder: Path, facts: Mapping[str, object]) -> Optional[Head]:
    """Return the heads of which a checkpoint has all weights and no others; None if that is unknown.

    Each class that transformers has for the model type is made without memory for its weights, and its names and shapes
    are compared with the files'. A model without a head whose output layer is its embeddings can also be loaded to
    write.
    """
    fits = _fits(TABLES, config, folder, facts)
    if fits is None:
        return None
    fitting = _fitting(fits, facts)
    head = min((fit.head for fit in fits), key=len)
    if not head:
        return Head((BASE, *fitting), f"{describe_architectures(facts)}, and weights without a head")
    return Head(tuple(fitting), f"{describe_architectures(facts)}, and a head of {some(head)}")


def checked_head(head: Head, config: SetupConfig, folder: Path, facts: Mapping[str, object]) -> Head:
    """Return the head of a class known by its ending only, without auto classes if its weights have more layers than
    transformers' own class for the ending."""
    fits = _fits(head.auto_models, config, folder, facts) if head.by_ending else None
    extra = [name for fit in fits or () for name in fit.extra]
    return Head((), f"{head.evidence}, and a head of {some(extra)}") if extra else head


class _Fit(NamedTuple):
    """A class compared with a checkpoint's weights."""

    auto_model: str
    missing: List[str]  # weights of its head, and whole parts, that the checkpoint lacks
    extra: List[str]  # weights of a head that the class lacks
    head: List[str]  # weights of any head in the checkpoint


def _fits(
    auto_models: Collection[str], config: SetupConfig, folder: Path, facts: Mapping[str, object]
) -> Optional[List[_Fit]]:
    """Compare transformers' classes for the model type with a checkpoint's weights; None if that is impossible."""
    stored = weight_shapes(folder)
    classes = [auto_model for auto_model in auto_models if stored and _has(auto_model, facts)]
    base = empty(BASE, config, folder) if classes else None
    if base is None:
        return None
    parts = {_part(name) for name, _ in base.named_parameters()}
    models = {auto_model: empty(auto_model, config, folder) for auto_model in classes}
    return [_compare(auto_model, model, stored, parts) for auto_model, model in models.items() if model is not None]


def _fitting(fits: Sequence[_Fit], facts: Mapping[str, object]) -> List[str]:
    """Return the classes of which a checkpoint has all weights and no others."""
    fitting = [fit.auto_model for fit in fits if not fit.missing and not fit.extra and _is_fit(fit.auto_model, facts)]
    if BOTH in fitting or MASKED in fitting:  # an encoder's two heads have the same weights
        left = MASKED if facts.get("is_decoder") and BOTH not in fitting else CAUSAL
        fitting = [auto_model for auto_model in fitting if auto_model != left]
    return fitting


def _compare(auto_model: str, model: PreTrainedModel, stored: Mapping[str, Shape], parts: Collection[str]) -> _Fit:
    """`parts` are the first components of the base model's weight names, which may have a prefix."""
    prefix = f"{model.base_model_prefix}."
    own = _own_weights(model, prefix)
    found = {name_in_base(name, prefix): shape for name, shape in stored.items()}
    known = {name for names in own for name in names}
    outside = [name for name in found if _part(name) not in parts and not _is_harmless(name)]
    extra = [name for name in outside if name not in known]
    # A head's weight that is tied to the embeddings may still be stored.
    untied = [name for name in outside if not any(name in names and len(names) > 1 for names in own)]
    return _Fit(auto_model, _missing(own, found, parts), extra, untied)


def _own_weights(model: PreTrainedModel, prefix: str) -> List[Dict[str, Shape]]:
    """Return each weight's shape by its names: several if it is tied."""
    tied: Dict[int, Dict[str, Shape]] = {}
    # torch 1.13 has no named_parameters(remove_duplicate=False).
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            own_name = name_in_base(f"{path}.{name}".lstrip("."), prefix)
            tied.setdefault(id(parameter), {})[own_name] = tuple(parameter.shape)
    return list(tied.values())


def _missing(own: Sequence[Dict[str, Shape]], found: Mapping[str, Shape], parts: Collection[str]) -> List[str]:
    """Return the weights of a class's head that a checkpoint lacks, and the parts of the class that it lacks
    entirely."""
    head = [names for names in own if not any(_part(name) in parts for name in names)]
    pooler = [names for names in own if any(name.startswith("pooler.") for name in names)]  # a classifier's first layer
    missing = [next(iter(names)) for names in head + pooler if all(found.get(name) != names[name] for name in names)]
    there = {_part(name) for name in found}
    return missing + sorted({_part(name) for names in own for name in names if len(names) == 1} - there)


def check_labels(config: SetupConfig, folder: Path, facts: Mapping[str, object], auto_model: str) -> None:
    """Raise SourceError if a classifier's head has another number of outputs than config.json has labels."""
    count, stored = len(label_names(facts)), weight_shapes(folder)
    model = empty(auto_model, config, folder) if stored else None
    for name, parameter in model.named_parameters() if model is not None else ():
        shape, made = stored.get(name, ()), tuple(parameter.shape)
        if made[:1] == (count,) != shape[:1] and len(made) == len(shape) == 2 and made[1:] == shape[1:]:
            said = f"{count} labels (id2label)" if facts.get("id2label") else f"no labels, so {count} are taken"
            raise SourceError(
                f"{config.model_name}: its config.json names {said}, but its head has {shape[0]} outputs ({name}); "
                "give id2label in config.json one name for each"
            )


def _part(name: str) -> str:
    return name.partition(".")[0]


def changing_answers(unread: Iterable[str], model: PreTrainedModel, with_head: bool) -> List[str]:
    """Return those of a checkpoint's weights that `model` does not read that may have changed answers in training.

    Poolers, other pretraining heads and buffers have not; nor has any head for a model without one.
    """
    prefix = f"{model.base_model_prefix}."
    parts = {name for name, _ in model.named_children()}
    names = {name: name_in_base(name, prefix) for name in unread}
    return sorted(
        name
        for name, plain in names.items()
        if _part(plain) != "pooler" and not _is_harmless(plain) and (with_head or _part(plain) in parts)
    )


def _is_harmless(name: str) -> bool:
    return name.startswith(_BESIDE) or name.endswith(_BUFFERS)


def _is_fit(auto_model: str, facts: Mapping[str, object]) -> bool:
    """A question answerer has two outputs: the answer's start and its end."""
    return auto_model != QUESTION or len(label_names(facts)) == 2


def name_in_base(name: str, prefix: str) -> str:
    """Return a weight's name without the base model's prefix, with a norm's names since 2019."""
    name = name[len(prefix) :] if name.startswith(prefix) else name
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        name = name[: -len(old)] + new if name.endswith(old) else name
    return name


def _has(auto_model: str, facts: Mapping[str, object]) -> bool:
    from transformers.models.auto import modeling_auto

    return facts.get("model_type") in getattr(modeling_auto, TABLES[auto_model])


def empty(
    auto_model: str, config: SetupConfig, folder: Path, labels: Optional[int] = None
) -> Optional[PreTrainedModel]:
    """Return the auto class's model for this configuration, without weights; None if it cannot be made.

    `labels` overrides the configuration's number.
    """
    try:
        return _made(auto_model, config, folder, labels)
    except Exception:  # transformers' many models raise anything; the loader will report it
        return None


def configuration_fault(config: SetupConfig, folder: Path, auto_model: Optional[str] = None) -> Optional[str]:
    """Return why the checkpoint's config.json cannot be read or, with `auto_model`, no such model be made of it, whatever its
    weights; None if it can."""
    try:
        if auto_model is None:
            _read_configuration(config, folder)
        else:
            _made(auto_model, config, folder)
    except Exception as error:  # transformers' many configurations and models raise anything
        return first_line(error)
    return None


def _made(auto_model: str, config: SetupConfig, folder: Path, labels: Optional[int] = None) -> PreTrainedModel:
    import transformers

    own, trust = _read_configuration(config, folder)
    if labels is not None:
        own.num_labels = labels
    with _without_memory():
        model: PreTrainedModel = getattr(transformers, auto_model).from_config(own, **trust)
        return model


def _read_configuration(config: SetupConfig, folder: Path) -> Tuple[PreTrainedConfig, Dict[str, bool]]:
    """Return the configuration, and the options to make a model of it."""
    from transformers import AutoConfig

    # transformers 4.26 passes options given here on to the model.
    trust = {"trust_remote_code": True} if config.trust_remote_code else {}
    return AutoConfig.from_pretrained(folder, local_files_only=True, **trust), trust


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Use torch's device "meta"; torch before 2.0 cannot make a module there."""
    import torch

    if int(torch.__version__.split(".")[0]) < 2:
        yield
        return
    with torch.device("meta"):
        yield


def weight_shapes(folder: Path) -> Dict[str, Shape]:
    """Return each weight's shape by name, from the files' headers; empty if these are unreadable."""
    return {name: weight.shape for name, weight in stored_weights(folder).items()}


def stored_weights(folder: Path) -> Dict[str, Stored]:
    """Return each weight's shape and dtype by name, from the files' headers; empty if these are unreadable."""
    import torch
    from safetensors import SafetensorError, safe_open

    found: Dict[str, Stored] = {}
    files, pickles = weight_files.files_of(folder), weight_files.are_pickles(folder)
    try:
        for file in () if pickles else files:
            with safe_open(file, "pt") as reader:
                slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
                found.update({name: Stored(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()})
        for file in files if pickles else ():
            weights = torch.load(file, map_location="meta", weights_only=True)
            found.update({name: Stored(tuple(one.shape), str(one.dtype)) for name, one in weights.items()})
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, pickle.UnpicklingError):
        return {}  # the loader reports what is wrong
    return found

"""Weights that transformers leaves out, or takes as they are stored where they are codes of quantized ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Dict, Iterator, List, Mapping, Optional, Sequence

from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints import head_weights, heads
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.head_weights import Stored
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import SourceError, some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNREAD_WEIGHTS = "unread_weights"  # in the receipt: the note on them
# Beginnings of dtypes' names, safetensors' and torch's.
_INTEGERS = ("I", "U", "BOOL", "torch.int", "torch.uint", "torch.bool")
_BELOW_16_BITS = ("F8", "F6", "F4", "torch.float8", "torch.float4")
# Scales of activations, and of keys and values in a cache, by which a server may round them; weights do not need them.
_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")
_BESIDE_ADAPTER = ".base_layer."  # in peft's names of a layer's own weights
_LAYER = re.compile(r".*?\.\d+(?=\.)")  # up to the first number


def note_on_unread(config: SetupConfig, report: Mapping[str, Any], model: PreTrainedModel) -> Optional[str]:
    """Return a note on weights that transformers leaves out without an error, such as layers beyond num_hidden_layers."""
    unread = _unread(config, report, model)
    if not unread:
        return None
    return (
        f"weights of the checkpoint that {type(model).__name__} does not read: {some(unread)}; if they were trained, answers "
        "are not those of the training's model"
    )


def check_quantized(config: SetupConfig, folder: Path, report: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Raise SourceError if codes of quantized weights are taken as numbers, as transformers does without a word for methods
    that it does not know."""
    if getattr(model, "hf_quantizer", None) is not None:  # which read them
        return
    method = _method(getattr(model.config, "quantization_config", None))
    codes = [] if method else list(_codes(folder, report.get("unexpected_keys", ()), model))
    if method or codes:
        raise SourceError(f"{config.model_name}: {_quantized(method, codes)}")


def check_merged(config: SetupConfig, report: Mapping[str, Any]) -> None:
    """Raise SourceError for a whole model that was saved while its adapter was beside it, as peft names their weights."""
    beside = sorted(name for name in report.get("unexpected_keys", ()) if _BESIDE_ADAPTER in name)
    if beside:
        raise SourceError(
            f"{config.model_name}: its weights are those of a base with an adapter of peft beside it, not merged "
            f"({some(beside)}); save the adapter alone by the save_pretrained of peft's model, or what its merge_and_unload() "
            "returns"
        )


def unloadable_codes(checkpoint: Checkpoint) -> Optional[str]:
    """Return that a checkpoint's weights are quantized if they are stored as whole numbers, on which transformers 4 fails; else
    None."""
    codes = [
        name
        for name, weight in head_weights.stored_weights(checkpoint.folder).items()
        if name.endswith(".weight") and weight.dtype.startswith(_INTEGERS)
    ]
    facts = checkpoint.read_object("config.json") or {}
    return _quantized(_method(facts.get("quantization_config")), codes) if codes else None


def _quantized(method: str, codes: Sequence[str]) -> str:
    how = f"by {method}, see quantization_config in its config.json," if method else f"({some(codes)})"
    return (
        f"its weights are quantized {how} and transformers would read their codes as numbers; name a checkpoint whose weights "
        "are float32, bfloat16 or float16"
    )


def check_layers(config: SetupConfig, folder: Path, report: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Raise SourceError if weights in layers that the model has are left out: it is another one than the training's."""
    inside = list(_inside_layers(_unread(config, report, model), model))
    stored = head_weights.stored_weights(folder) if inside else {}
    trained = [name for name in inside if not _is_buffer(stored.get(name), name)]
    if trained:
        raise SourceError(
            f"{config.model_name}: {type(model).__name__} does not read weights inside its layers ({some(trained)}), so its "
            f"answers would not be those of the training's model{_advice(trained)}"
        )


def _unread(config: SetupConfig, report: Mapping[str, Any], model: PreTrainedModel) -> List[str]:
    with_head = TASKS[config.task].auto_model != heads.BASE
    return head_weights.changing_answers(report.get("unexpected_keys", ()), model, with_head)


def _method(content: object) -> str:
    """Return the name of the quantization in a model's configuration of it; empty without one."""
    method = content.get("quant_method") if isinstance(content, dict) else getattr(content, "quant_method", None)
    return str(method or "")


def _codes(folder: Path, unread: Collection[str], model: PreTrainedModel) -> Iterator[str]:
    """Yield the weights that are stored as whole numbers, or in 8 bits beside an unread scale, and read as plain ones."""
    prefix = f"{model.base_model_prefix}."
    made: Dict[str, bool] = {}
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        made[head_weights.name_in_base(name, prefix)] = tensor.is_floating_point()
    scaled = {name.rpartition(".")[0] for name in unread if "scale" in name.rpartition(".")[2]}
    for name, weight in head_weights.stored_weights(folder).items():
        if name in unread or not made.get(head_weights.name_in_base(name, prefix), name.endswith(".weight")):
            continue
        scale = name.rpartition(".")[0] in scaled
        if weight.dtype.startswith(_INTEGERS) or (scale and weight.dtype.startswith(_BELOW_16_BITS)):
            yield name


def _inside_layers(unread: Sequence[str], model: PreTrainedModel) -> Iterator[str]:
    """Yield the weights that belong to layers of the model, which have a number, and are none of its buffers."""
    prefix = f"{model.base_model_prefix}."
    modules = {head_weights.name_in_base(name, prefix) for name, _ in model.named_modules()}
    buffers = {head_weights.name_in_base(name, prefix) for name, _ in model.named_buffers()}
    for name in unread:
        plain = head_weights.name_in_base(name, prefix)
        layer = _LAYER.match(plain)
        if layer and layer.group() in modules and plain not in buffers:
            yield name


def _is_buffer(weight: Optional[Stored], name: str) -> bool:
    """Return whether a weight was no trained one, as masks of attention that older versions stored, or is of activations."""
    if weight is None or name.endswith(_OF_ACTIVATIONS):
        return True
    return not weight.shape or weight.shape[:2] == (1, 1) or weight.dtype.startswith(_INTEGERS)


def _advice(names: Sequence[str]) -> str:
    if all(name.endswith("distance_embedding.weight") for name in names):
        return (
            ": transformers 5 has no relative positions for it (position_embedding_type in config.json); build with "
            "transformers 4.57"
        )
    return "; name a checkpoint of this transformers' model, or build with the transformers that saved it"

"""The library transformers: loads a checkpoint or a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Tuple

from traceserve_runtime.tasks import TASKS
from traceserve_runtime.versions import release_of

from traceserve.building.checkpoints import adapter_weights, head_weights, unread_weights, weight_files
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.gguf import located
from traceserve.building.checkpoints.seeding import seeded
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import SourceError, first_line, some

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


# What wraps a model in training puts before its weights' names; and where the model is in it.
_WRAPPERS = {
    "module.": ("torch's DistributedDataParallel or DataParallel", "model.module"),
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
}
Read = Callable[..., Tuple["PreTrainedModel", Mapping[str, Any]]]


@seeded()  # a missing head is random, but always the same
def load(config: SetupConfig, checkpoint: Checkpoint) -> Tuple[PreTrainedModel, Optional[str]]:
    """Load the task's auto-model; raises SourceError, also if the checkpoint lacks weights that the task needs.

    Also returns a note on weights that the model does not read.
    """
    import torch
    import transformers

    auto_model = getattr(transformers, TASKS[config.task].auto_model)
    weights = checkpoint if checkpoint.adapter is None else checkpoint.adapter.base

    def read(**options: object) -> Tuple[PreTrainedModel, Mapping[str, Any]]:
        with located(weights) as (folder, in_file):
            loaded: Tuple[PreTrainedModel, Mapping[str, Any]] = auto_model.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                torch_dtype=torch.float32,  # config.json's, the default since version 5, may round the weights
                **(_unpacked(in_file) if in_file else _weights(weights, transformers.__version__)),
                **{**adapter_weights.adapter_options(checkpoint, config.trust_remote_code), **options},
            )
            return loaded

    try:
        model, report = read()
    except Exception as error:  # transformers' many models raise anything
        raise SourceError(_refusal(error, config, checkpoint, auto_model.__name__, read)) from error
    wrapped = _wrapper_note(report)
    if wrapped:
        raise SourceError(f"{config.model_name}: {wrapped}")
    if not weights.gguf_file:  # its blocks are unpacked
        unread_weights.check_quantized(config, weights.folder, report, model)
    unread_weights.check_merged(config, report)
    model, missing = adapter_weights.merge_adapter(config.model_name, checkpoint, model, _untrained(report, model))
    if missing and not config.allow_untrained_head:
        raise SourceError(
            f"{config.model_name} holds no trained weights for the task {config.task} ({some(missing)}), so its answers "
            'would be random; name a fine-tuned checkpoint, or set "allow_untrained_head": true for a trial'
        )
    if not weights.gguf_file:
        unread_weights.check_layers(config, weights.folder, report, model)
    whole: PreTrainedModel = model.float().eval()  # modules of remote code may have a dtype of their own
    return whole, unread_weights.note_on_unread(config, report, model) if checkpoint.adapter is None else None


def _refusal(error: Exception, config: SetupConfig, checkpoint: Checkpoint, auto_model: str, read: Read) -> str:
    """Return a sentence on a failed load, which says whether config.json is wrong, alone or for these weights."""
    name = config.model_name
    if "mismatch" in str(error):
        other = _other_sizes(read)
        if other:
            advice = _old_key(checkpoint) or "take the config.json that was saved with these weights"
            return f"{name}: its config.json does not fit its weights, which have other sizes: {some(other)}; {advice}"
    why = first_line(error)
    if checkpoint.gguf_file:
        return f"{name} cannot be loaded as {auto_model}: {why}"
    quantized = unread_weights.unloadable_codes(checkpoint) if isinstance(error, RuntimeError) else None
    if quantized:
        return f"{name}: {quantized}"
    fault = head_weights.configuration_fault(config, checkpoint.folder)
    if fault:
        return f"{name}: its config.json cannot be loaded: {fault}"
    if head_weights.configuration_fault(config, checkpoint.folder, auto_model) == why:  # without weights too
        return f"{name} cannot be loaded as {auto_model}, which its config.json does not make: {why}"
    return f"{name} cannot be loaded as {auto_model}: {why}"


def _old_key(checkpoint: Checkpoint) -> str:
    """Return what to do about a key of config.json that transformers no longer reads, and the sizes depend on; empty without."""
    facts = checkpoint.read_object("config.json") or {}
    if facts.get("pruned_heads"):
        return "it has pruned_heads, which transformers 5 does not read: build with transformers 4.57"
    if "_num_labels" in facts and not facts.keys() & {"num_labels", "id2label"}:
        return f'it has _num_labels, which only old versions read: add "num_labels": {facts["_num_labels"]} to a copy of it'
    return ""


def _other_sizes(read: Read) -> List[str]:
    """Name the weights whose sizes are not the configuration's, with both sizes where transformers tells them."""
    try:
        _, report = read(ignore_mismatched_sizes=True)
    except Exception:  # the first error is reported
        return []
    return [_sizes(key) for key in sorted(report.get("mismatched_keys", ()), key=str)]


def _sizes(key: object) -> str:
    """Name a weight of transformers' report: its name, or that with the stored size and the configuration's."""
    if isinstance(key, str):
        return key
    assert isinstance(key, (tuple, list))
    name, *sizes = key
    return f"{name} (stored {', made '.join(str(list(size)) for size in sizes)})" if len(sizes) == 2 else str(name)


def _weights(checkpoint: Checkpoint, version: str) -> Dict[str, object]:
    """Return from_pretrained's options for reading safetensors, or a pickle of only weights.

    transformers before 4.41 has no `weights_only`, and before 4.28 no `use_safetensors`: these get loaded weights.
    This can go with the support of the Inf1 stack (4.26).
    """
    if release_of(version) >= (4, 41):
        return {"weights_only": True} if checkpoint.pickled else {"use_safetensors": True}
    return {"state_dict": weight_files.read_weights(checkpoint.folder)}


def _untrained(report: Mapping[str, Any], model: PreTrainedModel) -> List[str]:
    """Return the weights that the checkpoint lacks; an encoder's pooler does not matter if its output is not read."""
    mismatched = (
        key if isinstance(key, str) else key[0] for key in report.get("mismatched_keys", ())
    )  # or with two shapes
    missing = sorted({*report.get("missing_keys", ()), *mismatched})
    if type(model).__name__.endswith("Model"):  # without a head
        missing = [key for key in missing if not key.startswith("pooler.")]
    return missing


def _wrapper_note(report: Mapping[str, Any]) -> Optional[str]:
    """Say that the weights were saved from within a wrapper, so that transformers knows none of their names; else None."""
    unread = sorted(report.get("unexpected_keys", ()))
    for prefix, (wrapper, inside) in _WRAPPERS.items():
        if report.get("missing_keys") and unread and all(key.startswith(prefix) for key in unread):
            return (
                f"its weights' names begin with {prefix}, which {wrapper} puts before them; save them again with "
                f"{inside}.save_pretrained(folder)"
            )
    return None


def _unpacked(path: Path) -> Dict[str, object]:
    """Return from_pretrained's options for unpacking a GGUF file."""
    import transformers

    options: Dict[str, object] = {"gguf_file": str(path)}
    if hasattr(transformers, "GgufConfig"):  # since 5.23 weights stay in their blocks if a kernel reads them
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options

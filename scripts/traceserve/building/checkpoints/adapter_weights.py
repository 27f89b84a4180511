"""Merges an adapter's weights into its base's, and proves that the merged model answers like both."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Dict, List, Mapping, Tuple

from traceserve.building.checkpoints.adapters import FILE, PREFIX
from traceserve.building.checkpoints.agreement import LARGEST_DIFFERENCE, relative_difference, token_row
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.lookups import embedding_weights
from traceserve.errors import ExportError, SourceError, first_line, some

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def adapter_options(checkpoint: Checkpoint, trust_remote_code: bool) -> Dict[str, object]:
    """Return from_pretrained's options for loading the adapter's base; none for a whole checkpoint.

    The base's own head may differ in size from the adapter's, which replaces it.
    """
    if checkpoint.adapter is None:
        return {}
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code)
    return {"config": own, "ignore_mismatched_sizes": True}


def merge_adapter(
    name: str, checkpoint: Checkpoint, model: PreTrainedModel, missing: List[str]
) -> Tuple[PreTrainedModel, List[str]]:
    """Return the model merged with its adapter, in float32, and the weights that neither has.

    Raises SourceError for an adapter that does not fit this base, and ExportError for one whose answers change
    when merged.
    """
    adapter = checkpoint.adapter
    if adapter is None:
        return model, missing
    from peft import PeftModel
    from peft.utils import load_peft_weights

    folder = str(adapter.stored.folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of compilers for other hardware, and of causes checked below
            weights = load_peft_weights(folder, device="cpu")
            _resize(model, weights)
            tokens, own = len(embedding_weights(model)), model.config
            adapted = PeftModel.from_pretrained(model.float().eval(), folder).eval()
            report = adapted.load_adapter(folder, "default")
            strange = [*report.missing_keys, *(key for key in report.unexpected_keys if not _is_copy(key, weights))]
            if not strange:
                before = _outputs_of(adapted, tokens, own)
                model = adapted.merge_and_unload(safe_merge=True).eval()
                difference = relative_difference(before, _outputs_of(model, tokens, own))
    except KeyError as error:  # a module in modules_to_save
        raise SourceError(
            f"the adapter {name} lacks the weight {error.args[0]}, which a model of {adapter.base_name} has: save it again with "
            f"peft, or correct base_model_name_or_path in its {FILE}"
        ) from error
    except Exception as error:  # peft's many kinds raise anything
        raise SourceError(
            f"the adapter {name} cannot be merged into {adapter.base_name}: {first_line(error)}"
        ) from error
    if strange:
        raise SourceError(
            f"the adapter {name} does not belong to {adapter.base_name}: one has weights that the other lacks "
            f"({some(strange)}); correct base_model_name_or_path in its {FILE}"
        )
    if not difference <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"the adapter {name} answers differently once it is merged into its base (a difference of {difference:.2g} of the "
            "largest output), so it cannot be exported as one model"
        )
    return model, [key for key in missing if PREFIX + key not in weights]


def _resize(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Resize the base's embeddings to the adapter's: tokens may have been added before training."""
    embeddings, table = model.get_input_embeddings(), embedding_weights(model)
    name = next((name for name, module in model.named_modules() if module is embeddings), "")
    names = [f"{PREFIX}{name}.{layer}weight" for layer in ("", "base_layer.", "token_adapter.base_layer.")]
    count = next((len(weights[key]) for key in names if key in weights), len(table))
    if count != len(table):
        model.resize_token_embeddings(count)


def _is_copy(key: str, weights: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a weight also has its plain name, like peft's resized and trained embeddings."""
    plain = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return plain != key and plain in weights


def _outputs_of(model: torch.nn.Module, tokens: int, config: PreTrainedConfig) -> torch.Tensor:
    """Return a model's outputs for a row of tokens from the whole vocabulary; `model` may have the adapter beside it."""
    import torch

    ids = token_row(16, tokens)
    end = config.eos_token_id
    if isinstance(end, int):  # BART's classifier reads it
        ids[0, -1] = end
    more = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True, **more)[0]
    return output

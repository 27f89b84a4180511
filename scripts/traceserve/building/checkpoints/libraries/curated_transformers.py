"""The library curated-transformers: its encoders and causal language models, with transformers' interface.

transformers reads the checkpoint, and its weights are copied into the curated model under the names known here. The
curated library supports fewer settings than transformers (no base or scaling of rotary embeddings, one
kind of ALiBi) and silently ignores others, so the two models are compared on one long row: what is served is
what was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Type

from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints.agreement import LARGEST_DIFFERENCE, relative_difference, token_row
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.libraries import transformers
from traceserve.building.config.libraries import ENCODES
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ExportError, SourceError, first_line, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load(config: SetupConfig, checkpoint: Checkpoint) -> Tuple[PreTrainedModel, Optional[str]]:
    """Return the curated model of a checkpoint, for the task's auto-model, and a note on weights that transformers' does
    not read; raises SourceError, ExportError."""
    try:
        from curated_transformers import registry
        from curated_transformers.models.electra import ELECTRAEncoder
    except ImportError as error:
        raise ExportError(
            f"library curated_transformers is not installed ({error}); pip install 'traceserve[curated]', with Python 3.9 "
            "or newer"
        ) from error
    from traceserve.building.checkpoints.libraries.curated_models import CausalLM, Encoder

    encodes = TASKS[config.task].auto_model == ENCODES
    kinds = list((registry.encoders if encodes else registry.causal_lms).get_entry_points().values())
    if encodes:
        kinds.append(ELECTRAEncoder)  # the library has it, but does not register it
    original, note = transformers.load(config, checkpoint)
    kind = _kind(kinds, original.config, config.model_name)
    model = _filled(kind, original, config.model_name)
    longest = _longest(config, original.config, model)
    made: PreTrainedModel = Encoder(model, original) if encodes else CausalLM(model, original, longest)
    made.eval()
    _check_same(made, original, longest, config.model_name)
    return made, note


def _kind(kinds: List[Any], config: PreTrainedConfig, name: str) -> Type[Any]:
    """Return the library's class for such models."""
    facts = config.to_dict()
    for kind in kinds:
        if kind.is_supported(facts):
            return kind  # type: ignore[no-any-return]
    raise ExportError(
        f"{name} is of the type {config.model_type}, of which curated_transformers has no model for this task, but "
        f"{', '.join(kind.__name__ for kind in kinds)}; take library transformers"
    )


def _filled(kind: Type[Any], original: PreTrainedModel, name: str) -> Any:
    """Make a model of the class, with the configuration and weights of transformers' model."""
    try:
        model = kind.from_hf_config(hf_config=_facts(original.config))
        weights = dict(kind.state_dict_from_hf(original.state_dict()))
        head = original.get_output_embeddings()
        if head is not None:  # under any name: transformers 5 renamed GPT-NeoX's
            weights["output_embeddings.weight"] = head.weight
        report = model.load_state_dict(weights, strict=False)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"{name} cannot be loaded as {kind.__name__} of curated_transformers: {first_line(error)}; take library "
            "transformers"
        ) from error
    if report.missing_keys:
        raise SourceError(f"{name} lacks weights that {kind.__name__} has ({some(report.missing_keys)})")
    return model


def _facts(config: PreTrainedConfig) -> Dict[str, object]:
    """Return the configuration under its names of transformers 4.33, when the library was written."""
    facts = config.to_dict()
    rotary = facts.get("rope_parameters") or {}  # in transformers 5
    named = {"rotary_emb_base": rotary.get("rope_theta"), "rotary_pct": rotary.get("partial_rotary_factor", 1.0)}
    return {**(named if rotary else {}), **facts, "torch_dtype": "float32"}


def _longest(config: SetupConfig, facts: PreTrainedConfig, model: Any) -> int:
    """Return the most tokens that a row can have, including generated ones."""
    wanted = config.max_length or TASKS[config.task].longest_default
    limits = [getattr(facts, name, None) for name in ("max_position_embeddings", "max_seq_len")]  # MPT has the second
    limit = min([n for n in limits if isinstance(n, int) and n > 0], default=wanted)
    # RoBERTa and its kin count positions from the padding's id.
    offset = getattr(getattr(model, "embeddings", None), "padding_id", -1) + 1
    return min(wanted, limit - offset)


def _check_same(model: PreTrainedModel, original: PreTrainedModel, longest: int, name: str) -> None:
    """Raise ExportError unless both agree on a long row of tokens from the whole vocabulary."""
    import torch

    ids = token_row(longest, original.config.vocab_size)
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected, got = original(**columns)[0], model(**columns)[0]
    difference = relative_difference(expected, got)
    if not difference <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"curated_transformers computes something else from {name} than transformers (a difference of "
            f"{difference:.2g} of its largest output): it ignores parts of this configuration, such as the base and scaling "
            "of rotary embeddings; take library transformers"
        )

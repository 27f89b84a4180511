"""generation_config.json: the settings that are followed, have no effect here, or are refused.

An allow-list of GenerationConfig's keys in transformers 4.26 to 5.23. Other keys are refused by
name: silently ignoring a setting gives other texts than the checkpoint's author had.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Callable, Dict, FrozenSet, List, Mapping, NamedTuple, Tuple, Type

from traceserve.errors import SourceError

if TYPE_CHECKING:
    from traceserve_runtime.tasks.contract import Task
    from transformers import PreTrainedModel

FILE = "generation_config.json"


class Kind(NamedTuple):
    """Values of one kind: a test, and a name for errors."""

    holds: Callable[[object], bool]
    legal: str


def _whole(value: object) -> bool:
    return type(value) is int and value >= 0


def _wholes(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_whole, value))


_WHOLE = Kind(_whole, "a whole number of 0 or more")
_ID = Kind(_whole, "a token's id")
_IDS = Kind(_wholes, "a list of token ids")
_ID_OR_IDS = Kind(lambda value: _whole(value) or _wholes(value), "a token's id or a list of them")
_WORDS = Kind(
    lambda value: isinstance(value, (list, tuple)) and all(_wholes(word) and word for word in value),
    "a list of lists of token ids",
)
_NUMBER = Kind(
    lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0, "a number above 0"
)
_SWITCH = Kind(lambda value: isinstance(value, bool), "true or false")
_STRINGS = Kind(
    lambda value: isinstance(value, str) or (isinstance(value, (list, tuple)) and all(map(_is_text, value))),
    "a string or a list of strings",
)
_ANY = Kind(lambda value: True, "")  # the task's parameter of this name has the legal values


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


# Settings that are followed: defaults of a request's parameters, and the loop's for every request.
FOLLOWED: Dict[str, Kind] = {
    **dict.fromkeys(
        ("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p")
        + ("repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty", "early_stopping"),
        _ANY,
    ),
    "stop_strings": _STRINGS,
    "max_length": _WHOLE,
    "min_length": _WHOLE,
    "bos_token_id": _ID_OR_IDS,
    "eos_token_id": _ID_OR_IDS,
    "decoder_start_token_id": _ID_OR_IDS,
    "bad_words_ids": _WORDS,
    "forced_bos_token_id": _ID,
    "forced_eos_token_id": _ID_OR_IDS,
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "renormalize_logits": _SWITCH,
    "encoder_no_repeat_ngram_size": _WHOLE,
    "encoder_repetition_penalty": _NUMBER,
}
# Settings that change no text: records, additional outputs, memory, or speculation for speed
# (assisted generation writes what the model alone would write).
WITHOUT_EFFECT: FrozenSet[str] = frozenset(
    ("transformers_version", "_from_model_config", "_commit_hash", "_name_or_path", "model_type", "pad_token_id")
    + ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")
    + ("use_cache", "cache_config", "max_cache_len", "return_legacy_cache", "prefill_chunk_size", "low_memory")
    + ("compile_config", "disable_compile", "continuous_batching_config", "is_assistant", "num_assistant_tokens")
    + ("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit", "use_mtp")
    + ("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind")
    + ("remove_invalid_values",)  # a model with NaN outputs fails its request
    + ("chat_format", "max_window_size")  # for remote code's own chat function, which is never called
)
# Those of them that `generate` implements in its own way, so that the original runs without them.
_ASKED_WITHOUT = (
    ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "return_dict_in_generate", "output_scores")
    + ("output_logits", "output_attentions", "output_hidden_states", "low_memory", "remove_invalid_values")
    + ("compile_config", "cache_implementation", "cache_config", "prefill_chunk_size")
)
# Settings that are not supported, with their neutral values.
NEUTRAL: Dict[str, Tuple[object, ...]] = {
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "guidance_scale": (1.0,),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "watermarking_config": (),
    "dola_layers": (),
    "max_time": (),
    "token_healing": (False,),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
    "cache_implementation": ("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "hybrid")
    + ("sliding_window", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
}
_REASONS = {
    "num_return_sequences": "an answer is one text",
    "max_time": "the texts of a busy server would be cut anywhere",
    "cache_implementation": "a cache that rounds its numbers gives other texts",
}


def check_settings(
    settings: Mapping[str, object], where: str = FILE, parameters: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Raise SourceError for a setting that is neither followed nor without effect, or has an illegal value.

    setup_config.json's `parameters` replace settings.
    """
    for key, value in settings.items():
        if value is None or key in WITHOUT_EFFECT:
            continue
        if key in FOLLOWED:
            if not FOLLOWED[key].holds(value):
                raise SourceError(f"{where} says {key} = {value!r}, but it should be {FOLLOWED[key].legal}")
        elif key not in NEUTRAL:
            raise SourceError(
                f"{where} has the key {key}, which is not known here and may change what is written; remove it there if "
                "it changes nothing"
            )
        elif not any(
            type(value) is type(neutral) and value == neutral or _equal(value, neutral) for neutral in NEUTRAL[key]
        ):
            legal = f", or set it to {NEUTRAL[key][0]!r}" if NEUTRAL[key] and NEUTRAL[key][0] else ""
            reason = f" ({_REASONS[key]})" if key in _REASONS else ""
            raise SourceError(
                f"{where} sets {key} to {value!r}, which is not supported{reason}; remove it there{legal} if the texts may "
                "be written without it"
            )
    _check_beams(settings, where, parameters)


def _check_beams(settings: Mapping[str, object], where: str, parameters: Mapping[str, object]) -> None:
    """Raise SourceError for beam search that samples, as `generate` does; a request for both is refused too."""
    merged = {**settings, **parameters}
    beams = merged.get("num_beams")
    if merged.get("do_sample") is True and type(beams) is int and beams > 1:
        places = {"parameters" if key in parameters else where for key in ("num_beams", "do_sample")}
        raise SourceError(
            f"{' with '.join(sorted(places))} sets num_beams to {beams} and do_sample to true, but beam search does not "
            'sample here; set "num_beams": 1 or "do_sample": false in parameters of setup_config.json'
        )


def _equal(value: object, neutral: object) -> bool:
    """Return whether two numbers are equal, integer or not."""
    numbers = (int, float)
    return type(value) in numbers and type(neutral) in numbers and bool(value == neutral)


def check_legacy(config: Mapping[str, object], parameters: Mapping[str, object]) -> None:
    """Check a config.json, which had these settings before generation_config.json existed; raises SourceError."""
    check_settings({key: config[key] for key in (*FOLLOWED, *NEUTRAL) if key in config}, "config.json", parameters)


def of_task(config: Mapping[str, object], task: Type[Task]) -> Dict[str, object]:
    """Return the settings that transformers 4.57's pipeline takes from config.json's task_specific_params, with the
    prefix.

    text-generation's, which transformers 5 still has, takes none there.
    """
    params = config.get("task_specific_params")
    own = params.get(task.pipeline) if isinstance(params, Mapping) and task.task_specific_params else None
    return dict(own) if isinstance(own, Mapping) else {}


def unread_settings(config: Mapping[str, object], task: Type[Task]) -> List[str]:
    """Return the names under which task_specific_params has settings that this task does not read."""
    params = config.get("task_specific_params")
    read = of_task(config, task)
    return [
        str(name)
        for name, own in (params.items() if isinstance(params, Mapping) else ())
        if own and not (read and name == task.pipeline)
    ]


def settle_generation(model: PreTrainedModel, task: Type[Task], parameters: Mapping[str, object]) -> Dict[str, object]:
    """Return the settings that a task reads, and set the model's own to match, so that it is asked for the same texts.

    Raises SourceError for those that are neither followed nor without effect.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None or not model.can_generate():
        return {}
    own = {key: value for key, value in of_task(model.config.to_dict(), task).items() if key != "prefix"}
    where = "config.json (or generation_config.json)" if getattr(generation, "_from_model_config", False) else FILE
    check_settings(own, "config.json's task_specific_params", parameters)
    check_settings(generation.to_diff_dict(), where, {**own, **parameters})
    generation.update(**own)
    neutral = type(generation)()
    for key in _ASKED_WITHOUT:
        if hasattr(neutral, key):
            setattr(generation, key, getattr(neutral, key))
    followed = {key: value for key, value in generation.to_diff_dict().items() if key in FOLLOWED and value is not None}
    generation.stop_strings = None  # the gate passes them as a criterion: `generate`'s own fails for some tokenizers
    return followed

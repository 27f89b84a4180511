"""Text to text: translation, summaries and the like, with an encoder and a decoder."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from traceserve_runtime.errors import InvalidRequest, TraceserveError, Unsupported
from traceserve_runtime.generation.scores import GenerationSettings
from traceserve_runtime.json_types import Json
from traceserve_runtime.tasks.contract import Details, ModelFacts, Parts, Request
from traceserve_runtime.tasks.generating import NEW_TOKENS_OF_SAMPLE, Generating, first_id
from traceserve_runtime.tasks.generation_parameters import PARAMETERS
from traceserve_runtime.tasks.parameters import Field, Parameter
from traceserve_runtime.texts.pieces import renumbered
from traceserve_runtime.texts.rows import Encoded, Row, Segments

_UNSET_LENGTH = 20  # transformers' max_length, which its pipeline treats as not set by the checkpoint
_LONGEST_TEXT = 4096  # tokens, for models without a limit on positions
_LONGEST_CODE = 64  # in characters: comparing a long one with the known codes takes minutes


_LANGUAGES = (
    Parameter(
        "src_lang",
        str,
        "the text's language, by its code in the model's tokenizer, such as en_XX; for multilingual models",
    ),
    Parameter("tgt_lang", str, "the output's language, likewise"),
)
_POSITIONS = ("max_decoder_position_embeddings", "max_target_positions", "max_position_embeddings")
_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")  # as decoders: they count positions from pad_token_id + 1
LANGUAGE_PARAMETERS = tuple(parameter.name for parameter in _LANGUAGES)


def _positions(config: Mapping[str, Any]) -> Optional[int]:
    """Return how many positions the decoder has, by whichever name its family has for them; None if they are relative."""
    own = config["decoder"] if isinstance(config.get("decoder"), dict) else config
    found: Optional[int] = next((own[name] for name in _POSITIONS if isinstance(own.get(name), int)), None)
    if found is None or own.get("model_type") not in _FROM_PADDING:
        return found
    return found - int(own["pad_token_id"]) - 1


class Text2TextGeneration(Generating):
    """`{"generated_text"}`: the model's output for the text. (A T5 expects its own prefix, such as "summarize: ".)"""

    name = "text2text_generation"
    auto_model = "AutoModelForSeq2SeqLM"
    pipeline = "text2text-generation"
    loop = "encoder_decoder"
    fields = (Field("text", True, "the text"),)
    parameters = (*PARAMETERS, *_LANGUAGES)
    pipeline_defaults = {"num_beams": 4}
    task_specific_params = True
    sample_parameters = {"max_new_tokens": NEW_TOKENS_OF_SAMPLE}
    sample = {"text": "The train to the coast leaves at a quarter past nine from platform four."}

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        start = first_id(model.generation.get("decoder_start_token_id"), model.config.get("decoder_start_token_id"))
        if start is None:
            start = first_id(model.generation.get("bos_token_id"), model.config.get("bos_token_id"))
        if start is None:
            raise Unsupported("the checkpoint names no token that its decoder begins with (decoder_start_token_id)")
        most = _positions(model.config) or _LONGEST_TEXT
        facts = super().facts(model)
        if facts["max_length"] == _UNSET_LENGTH:
            facts["max_length"] = None
        return {
            **facts,
            "start_id": start,
            "most_new_tokens": most,
            "languages": dict(model.languages),
            "source_id": model.source_id,
        }

    def segments(self, request: Request) -> List[Segments]:
        self.check_parameters(request)
        prefix = self.manifest.facts["prefix"]
        return [segments._replace(text=prefix + segments.text) for segments in super().segments(request)]

    def check_parameters(self, request: Request) -> None:
        super().check_parameters(request)
        for name in LANGUAGE_PARAMETERS:
            self._language(request, name)

    def _language(self, request: Request, name: str) -> Optional[int]:
        """Return the token of the language in the parameter; raises InvalidRequest for an unknown code."""
        code = self.parameter(request, name)
        languages: Dict[str, int] = self.manifest.facts["languages"]
        if code is None or code in languages:
            return None if code is None else languages[code]
        if not languages:
            raise InvalidRequest(f"this model's tokenizer has no languages; leave {name} out", f"parameters.{name}")
        raise InvalidRequest(
            f"this model does not know that language; did you mean {nearest_code(code, languages)}? It knows "
            f"{len(languages)} codes",
            f"parameters.{name}",
        )

    def tokenize(self, requests: Sequence[Request], parts: Sequence[Parts]) -> List[Union[Encoded, TraceserveError]]:
        return [self._in_language(request, item) for request, item in zip(requests, super().tokenize(requests, parts))]

    def _in_language(self, request: Request, item: Union[Encoded, TraceserveError]) -> Union[Encoded, TraceserveError]:
        """Return the rows with the usual language token replaced by the request's."""
        usual = self.manifest.facts["source_id"]
        if isinstance(item, TraceserveError) or usual is None:
            return item
        wanted = self._language(request, "src_lang")
        if wanted in (None, usual):
            return item
        rows = []
        for row in item.rows:
            own = zip(row.encoding.ids, row.encoding.special_tokens_mask)
            ids = [wanted if special and number == usual else number for number, special in own]
            rows.append(replace(row, encoding=renumbered(row.encoding, ids)))
        return replace(item, rows=rows)

    def settings(self, request: Request, row: Row, prompt: Sequence[int]) -> GenerationSettings:
        settings = super().settings(request, row, prompt)
        target = self._language(request, "tgt_lang")
        return settings if target is None else replace(settings, forced_bos_id=target)

    def prompt(self, row: Row) -> List[int]:
        return [self.manifest.facts["start_id"]]

    @property
    def longest_text(self) -> int:
        most: int = self.manifest.facts["most_new_tokens"]
        return most

    def room(self, row: Row) -> int:
        return self.longest_text

    def text(self, tokens: Sequence[int]) -> str:
        # Like its pipeline, which does not clean up.
        return self.tokenizer.decode(tokens, skip_special_tokens=True, raw=True)

    def value(self, request: Request, text: str, details: Details) -> Json:
        told = {"details": details} if self.parameter(request, "details") else {}
        return {"generated_text": text, **told}

    def from_texts(self, texts: Sequence[str]) -> List[Request]:
        """Use each text, every other one with beams and, with many languages, every third in another; truncate the long
        ones."""
        codes = sorted(self.manifest.facts["languages"])
        requests = []
        for i, text in enumerate(texts):
            parameters = {**self.gate_parameters, "long_inputs": "truncate", "num_beams": 1 + 2 * (i % 2)}
            if codes and i % 3 == 0:
                parameters.update(src_lang=codes[i % len(codes)], tgt_lang=codes[-1 - i % len(codes)])
            requests.append(Request({"text": text}, parameters))
        return requests


def nearest_code(code: str, codes: Iterable[str]) -> str:
    """Return the likeliest known code: the most similar of those that begin alike."""
    letters = code[:_LONGEST_CODE].lower()

    def likeness(known: str) -> Tuple[bool, float]:
        return known.lower()[:2] == letters[:2], difflib.SequenceMatcher(None, letters, known.lower()).ratio()

    return max(sorted(codes), key=likeness)

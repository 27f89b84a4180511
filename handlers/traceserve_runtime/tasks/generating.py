"""The parts common to tasks that write text: their parameters and the loop."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Callable, ClassVar, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.costs import Pace
from traceserve_runtime.errors import InvalidRequest, TraceserveError, Unsupported
from traceserve_runtime.generation.loop import Member, WritingLoop
from traceserve_runtime.generation.scores import GenerationSettings
from traceserve_runtime.generation.search import Likelihood, Search, search_for
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Runner
from traceserve_runtime.tasks.contract import (
    Details,
    Job,
    ModelFacts,
    Parts,
    Request,
    Task,
    WrittenToken,
    check_numbers,
    without_prefix,
    without_refused,
)
from traceserve_runtime.tasks.generation_parameters import SAMPLING
from traceserve_runtime.tasks.parameters import Output, strings
from traceserve_runtime.tasks.token_details import check_time, spelling, time_of, token_details
from traceserve_runtime.texts import limits
from traceserve_runtime.texts.continuation import Continuation
from traceserve_runtime.texts.rows import Encoded, Row
from traceserve_runtime.texts.written_text import WrittenText

# Settings of transformers with another name here.
_PARAMETERS_OF = {"stop_strings": "stop"}
NEW_TOKENS_OF_SAMPLE, _NEW_TOKENS_OF_WARM_UP = 24, 4  # the gate's samples too; fewer where max_length is short
TAIL = 16  # the prompt's last tokens, in which a stop string may begin
_COLD = 1e-6  # a temperature below it leaves only the best token, and scores divided by it would be infinite


class Generating(Task):
    """The base of the tasks that write text."""

    outputs = (Output("logits", per_token=False),)
    merges_windows = False
    pipeline_defaults: ClassVar[Dict[str, object]] = {}  # if the checkpoint sets nothing
    gate_parameters = {"max_new_tokens": NEW_TOKENS_OF_SAMPLE, "do_sample": False}

    @classmethod
    def defaults(cls, model: ModelFacts) -> Dict[str, object]:
        """Return the parameters set in the checkpoint's generation_config.json."""
        known = {parameter.name: parameter for parameter in cls.parameters}
        settings = {_PARAMETERS_OF.get(name, name): value for name, value in model.generation.items()}
        found = {**cls.pipeline_defaults, **{name: value for name, value in settings.items() if name in known}}
        found = {name: value for name, value in found.items() if value is not None}
        for name, value in found.items():
            if not known[name].accepts(value):
                written = {ours: theirs for theirs, ours in _PARAMETERS_OF.items()}.get(name, name)
                raise Unsupported(
                    f"generation_config.json says {written} = {value!r}, but it should be {known[name].legal}"
                )
        return found

    @classmethod
    def archive_defaults(cls, model: ModelFacts, chosen: Mapping[str, object]) -> Dict[str, object]:
        """As a request does, a configuration that sets a parameter of sampling asks for it; a checkpoint's settings do not."""
        found: Dict[str, Any] = super().archive_defaults(model, chosen)
        named = next((name for name in SAMPLING if name in chosen), None)
        cold = found.get("temperature", 1.0) < _COLD
        if named is not None and "do_sample" not in chosen and not cold:
            if chosen.get("num_beams") not in (None, 1):
                raise Unsupported(
                    f"parameters: beam search does not sample; leave either num_beams or {named} out, or add "
                    '"do_sample": false'
                )
            found["do_sample"] = True
        if found.get("details") and found.get("num_beams", 1) > 1 and (cold or not found.get("do_sample")):
            raise Unsupported('parameters: details are not available with beam search; add "num_beams": 1')
        return found

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        """Return the rest of generation_config.json: end and suppressed tokens. Raises Unsupported."""
        settings = model.generation
        ends = _ids(settings.get("eos_token_id"))
        return {
            "eos_ids": ends,
            "bad_words_ids": _words(settings.get("bad_words_ids"), ends),
            "forced_bos_id": settings.get("forced_bos_token_id"),
            "forced_eos_ids": _ids(settings.get("forced_eos_token_id")),
            "suppress_ids": settings.get("suppress_tokens") or [],
            "begin_suppress_ids": settings.get("begin_suppress_tokens") or [],
            "min_length": settings.get("min_length") or 0,
            "max_length": settings.get("max_length"),
            "renormalize": bool(settings.get("renormalize_logits")),
            "source_ngram_size": settings.get("encoder_no_repeat_ngram_size") or 0,
            "source_penalty": settings.get("encoder_repetition_penalty") or 1.0,
            "prefix": cls.prefix_of(model),
        }

    @classmethod
    def prefix_of(cls, model: ModelFacts) -> str:
        """Return config.json's prefix, which the pipeline prepends to each text. Raises Unsupported if it is not a
        string."""
        prefix = model.config.get("prefix")
        params = model.config.get("task_specific_params")
        if cls.task_specific_params and isinstance(params, dict) and isinstance(params.get(cls.pipeline), dict):
            prefix = params[cls.pipeline].get("prefix", prefix)
        if not isinstance(prefix, (str, type(None))):
            raise Unsupported(f"config.json says prefix = {prefix!r}, but it should be a string; remove it, or fix it")
        return prefix or ""

    @classmethod
    def short_parameters(cls, manifest: Manifest) -> JsonObject:
        return {**super().short_parameters(manifest), "max_new_tokens": that_fit(NEW_TOKENS_OF_SAMPLE, manifest)}

    def parts(self, requests: Sequence[Request]) -> List[Parts]:
        parts = super().parts(requests)
        sums = limits.GroupSums()
        for request, part in zip(requests, parts):
            if not isinstance(part, TraceserveError) and self.parameter(request, "details"):
                sums.add(request.group, *self._reported(request))
        return without_refused(sums.refused(check_time), requests, parts)

    def _reported(self, request: Request) -> Tuple[int, int]:
        """Return how many log-probabilities a request may be answered with, and how many take as long to make."""
        length = min(self._most_new_tokens(request) or self.manifest.facts["max_length"], self.longest_text)
        count = length * (1 + self.parameter(request, "top_n_tokens"))
        return count, time_of(self.tokenizer, length, count)

    def tokenize(self, requests: Sequence[Request], parts: Sequence[Parts]) -> List[Union[Encoded, TraceserveError]]:
        written = len(self.manifest.facts["prefix"])
        return [without_prefix(item, "text", written) for item in super().tokenize(requests, parts)]

    def check_parameters(self, request: Request) -> None:
        """Raise InvalidRequest for parameters that contradict each other."""
        if self._samples(request) and request.parameters.get("num_beams", 1) > 1:
            raise InvalidRequest(
                f"beam search does not sample; send either num_beams or do_sample, {', '.join(SAMPLING)}",
                "parameters.num_beams",
            )
        biased = self.parameter(request, "logit_bias") or {}
        unknown = next((token for token in biased if not self.tokenizer.has_token(int(token))), None)
        if unknown is not None:
            raise InvalidRequest(f"this model has no token {unknown}", "parameters.logit_bias")
        if self.parameter(request, "details") and self._beams(request) > 1:
            raise InvalidRequest(
                'details are not available with beam search; send "num_beams": 1 too',
                "parameters.details",
            )

    @classmethod
    def samples(cls, parameters: Mapping[str, Any], manifest: Manifest) -> bool:
        if {**manifest.parameters, **parameters}.get("temperature", 1.0) < _COLD:
            return False
        if "do_sample" in parameters:
            return bool(parameters["do_sample"])
        if any(name in parameters for name in SAMPLING):
            return True
        return bool(manifest.parameters.get("do_sample")) and "num_beams" not in parameters

    def _samples(self, request: Request) -> bool:
        return self.samples(request.parameters, self.manifest)

    @property
    def counted_prefix(self) -> int:
        """The prefix's tokens, which limits on the whole sequence's length do not count."""
        return 0

    def _most_new_tokens(self, request: Request) -> Optional[int]:
        """Return the most tokens to write, without their room; None if the checkpoint limits them with the prompt's."""
        most: Optional[int] = self.parameter(request, "max_new_tokens")
        return most if most is not None or self.manifest.facts["max_length"] is not None else 256

    def _beams(self, request: Request) -> int:
        beams: int = 1 if self._samples(request) else self.parameter(request, "num_beams")
        return beams

    def settings(self, request: Request, row: Row, prompt: Sequence[int]) -> GenerationSettings:
        """Return the settings that continue this request's row after its prompt's tokens."""
        facts = self.manifest.facts
        most = self._most_new_tokens(request)
        if most is None:
            most = max(1, facts["max_length"] + self.counted_prefix - len(prompt))
        asked = {**self.manifest.parameters, **request.parameters}
        least = 0 if "min_new_tokens" in asked else facts["min_length"]
        take = {
            name: self.parameter(request, name)
            for name in (*SAMPLING, "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "length_penalty")
            + ("early_stopping", "presence_penalty", "frequency_penalty")
        }
        return GenerationSettings(
            max_new_tokens=min(most, self.room(row)),
            do_sample=self._samples(request),
            num_beams=self._beams(request),
            min_length=least + self.counted_prefix if least else 0,
            eos_ids=tuple(facts["eos_ids"]),
            bias=tuple((int(token), added) for token, added in (self.parameter(request, "logit_bias") or {}).items()),
            bad_words_ids=tuple(tuple(word) for word in facts["bad_words_ids"]),
            forced_bos_id=facts["forced_bos_id"],
            forced_eos_ids=tuple(facts["forced_eos_ids"]),
            suppress_ids=tuple(facts["suppress_ids"]),
            begin_suppress_ids=tuple(facts["begin_suppress_ids"]),
            renormalize=facts["renormalize"],
            source=tuple(row.encoding.ids),
            source_ngram_size=facts["source_ngram_size"],
            source_penalty=facts["source_penalty"],
            alternatives=self.parameter(request, "top_n_tokens") if self.parameter(request, "details") else None,
            **take,
        )

    def prompt(self, row: Row) -> List[int]:
        """Return the tokens that a row's text continues, as penalties count them."""
        raise NotImplementedError

    @property
    def longest_text(self) -> int:
        """The most tokens of any text."""
        raise NotImplementedError

    def room(self, row: Row) -> int:
        """Return how many tokens can be written."""
        raise NotImplementedError

    def text(self, tokens: Sequence[int]) -> str:
        """Decode new tokens."""
        raise NotImplementedError

    def open_loop(
        self, runner: Runner, stats: Stats, pace: Optional[Pace] = None, seconds: float = math.inf
    ) -> Optional[WritingLoop]:
        return WritingLoop(runner, self.manifest, self.loop, stats, self.most_tokens, pace, seconds)

    def member(self, job: Job) -> Member:
        return Member(job.row, partial(self._search, job), self._beams(job.request))

    def _search(self, job: Job) -> Search:
        prompt = self.prompt(job.row)
        settings = self.settings(job.request, job.row, prompt)

        # Beams are several sequences, of which any may come next.
        one = settings.num_beams == 1
        decode = self.decoding(job.request)
        alone = WrittenText(decode, self.tokenizer.decodes_locally).of if one else decode
        continued = _continuing(decode, self.tail(prompt), alone)
        told = self._told(job, continued if self.follows_a_word(job.request) else alone)
        searched = continued if job.request.continues else self._spelled(prompt, growing=one)
        return search_for(prompt, settings, self._ends(job.request, prompt, searched), told)

    def _spelled(self, prompt: Sequence[int], growing: bool) -> Callable[[List[int]], str]:
        """Return what spells new tokens behind their prompt, special ones too. `growing`: the last call's tokens are the
        first of the next one's."""
        spell, locally, near = spelling(self.tokenizer)
        return _continuing(spell, prompt[-TAIL:], WrittenText(spell, locally, near).of if growing else spell)

    def written(self, member: Member) -> Arrays:
        """Return the row's new tokens, int64 of shape (tokens), and their log-probabilities if kept."""
        assert member.search is not None
        return _written(member.search)

    def answer(
        self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]
    ) -> Tuple[Json, Optional[Details]]:
        check_numbers(outputs)
        details = self._details(request, rows[0], outputs[0])
        return self.value(request, self.text(outputs[0]["tokens"].tolist()), details), details

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Json:
        return self.answer(request, rows, outputs)[0]

    def value(self, request: Request, text: str, details: Details) -> Json:
        """Return the answer with this new text, and its details if the request asks for them."""
        raise NotImplementedError

    def _details(self, request: Request, row: Row, output: Arrays) -> JsonObject:
        """Return why the text ended, and its tokens, in text-generation-inference's format."""
        ids = output["tokens"].tolist()
        found: JsonObject = {"finish_reason": self._finish_reason(request, row, ids), "generated_tokens": len(ids)}
        if "logarithms" not in output:
            return found
        return {
            **found,
            "seed": self.parameter(request, "seed"),
            "prefill": [],
            **token_details(self.tokenizer, output),
        }

    def _finish_reason(self, request: Request, row: Row, ids: Sequence[int]) -> str:
        if ids and ids[-1] in self.manifest.facts["eos_ids"]:
            return "eos_token"
        prompt = self.prompt(row)
        decode = self.decoding(request)
        continued = _continuing(decode, self.tail(prompt), decode)
        ends = self._ends(request, prompt, continued if request.continues else self._spelled(prompt, growing=False))
        return "stop_sequence" if ends is not None and ends(list(ids)) else "length"

    def _ends(
        self, request: Request, prompt: Sequence[int], text_of: Callable[[List[int]], str]
    ) -> Optional[Callable[[List[int]], bool]]:
        """Return a test for stop strings in new tokens, whose text continues the prompt's. As with transformers, they may
        begin in the prompt, and special tokens are spelled; as with OpenAI, only what is written counts, though they may be
        a special token. None without stop strings."""
        stops = self.parameter(request, "stop")
        if stops is None:
            return None
        wanted = strings(stops)
        ids = [self.tokenizer.token_id(stop) for stop in wanted]
        special = self.tokenizer.special_of(number for number in ids if number is not None)
        tail = "" if request.continues else spelling(self.tokenizer).decode(prompt[-TAIL:])
        searched = tail  # a text without any of them

        def ends(tokens: List[int]) -> bool:
            nonlocal searched
            if special.intersection(tokens[-1:]):
                return True
            text = tail + text_of(tokens)
            new = max(len(tail), len(searched)) if text.startswith(searched) else len(tail)
            if any(text.find(stop, max(0, new - len(stop) + 1)) >= 0 for stop in wanted):
                return True
            searched = text.rstrip("\ufffd")
            return False

        return ends

    def _told(
        self, job: Job, text_of: Callable[[List[int]], str]
    ) -> Optional[Callable[[List[int], Sequence[Likelihood]], None]]:
        """Return the callback that streams a row's growing text; None if nobody asked for it."""
        emit = job.emit
        if emit is None or not self.streams(job.request):
            return None
        send = emit
        kept: List[WrittenToken] = []

        def tell(tokens: List[int], likelihoods: Sequence[Likelihood]) -> None:
            special = self.tokenizer.special_of(tokens[len(kept) :]) if likelihoods else ()
            for token, each in zip(tokens[len(kept) :], likelihoods[len(kept) :]):
                kept.append(WrittenToken(token, each.taken, token in special))
            if self.tokenizer.ends_in_bytes(tokens):
                return
            text = self._settled(text_of(tokens), job.request.clean_up)
            if likelihoods:
                send(text, list(kept))
            else:
                send(text)

        return tell

    def tail(self, prompt: Sequence[int]) -> List[int]:
        """Return the end of the prompt, which new tokens continue."""
        return []

    def follows_a_word(self, request: Request) -> bool:
        """Return whether the request asks for its text as it continues its prompt's, and that one may end in a word."""
        return False

    def decoding(self, request: Request) -> Callable[[Sequence[int]], str]:
        """Return what decodes the new tokens of the text that a request is answered with."""
        return self.text

    def _settled(self, text: str, clean_up: bool = True) -> str:
        """Return the part of a growing text that more tokens cannot change: no partial characters, no removable
        space."""
        text = text.rstrip("\ufffd")
        if not (clean_up and self.manifest.tokenizer.clean_up):
            return text
        # "do n '" and "t" become "don't".
        return text.rsplit(" ", 2 if text.endswith(" n '") else 1)[0]

    def same(self, answer: Json, other: Json) -> bool:
        """Require the same text; details may be compared only where both were asked for, and round otherwise."""
        return bool(_without_details(answer) == _without_details(other))

    def repeatable(self, request: Request) -> bool:
        """Return False for sampled tokens: the original samples others."""
        return not self._samples(request)

    def warm_up_requests(self) -> List[Request]:
        """Write a few tokens."""
        most = that_fit(_NEW_TOKENS_OF_WARM_UP, self.manifest)
        return [Request(self.sample, {"max_new_tokens": most, "long_inputs": "truncate"})]


def _continuing(
    decode: Callable[[Sequence[int]], str], tail: Sequence[int], alone: Callable[[List[int]], str]
) -> Callable[[List[int]], str]:
    """Return what decodes new tokens as they continue the end of their prompt; `alone` decodes them by themselves."""
    continuation = Continuation(decode, tail)
    return lambda tokens: continuation.of(tokens, alone(tokens))


def that_fit(most: int, manifest: Manifest) -> int:
    """Return so many new tokens, or half of max_length where that is not longer: a decoder reads and writes within it."""
    return most if most < manifest.max_length else max(1, manifest.max_length // 2)


def _written(search: Search) -> Arrays:
    """Return the new tokens, int64 of shape (tokens), and their log-probabilities if kept."""
    tokens = np.array(search.tokens, dtype=np.int64)
    likelihoods: Sequence[Likelihood] = getattr(search, "likelihoods", ())
    if not likelihoods:
        return {"tokens": tokens}
    arrays: Arrays = {"tokens": tokens, "logarithms": np.array([each.taken for each in likelihoods], dtype=np.float32)}
    if len(likelihoods[0].ids):
        arrays["top_ids"] = np.stack([each.ids for each in likelihoods])
        arrays["top_logarithms"] = np.stack([each.values for each in likelihoods])
    return arrays


def _without_details(answer: Json) -> Json:
    """Return an answer without the details of its text."""
    if isinstance(answer, list):
        return [_without_details(each) for each in answer]
    return {key: value for key, value in answer.items() if key != "details"} if isinstance(answer, dict) else answer


def _ids(value: object) -> List[int]:
    """Return one token id, several or none as a list."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value] if isinstance(value, int) else []


def _words(value: object, ends: Sequence[int]) -> List[Json]:
    """Return the words that must not be written: without the end by itself, which transformers leaves out."""
    words: List[Json] = list(value) if isinstance(value, (list, tuple)) else []
    return [word for word in words if word not in [[end] for end in ends]]


def first_id(*values: object) -> Optional[int]:
    """Return the first token id that is set."""
    return next((ids[0] for ids in map(_ids, values) if ids), None)

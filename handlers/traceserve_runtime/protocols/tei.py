"""The API of text-embeddings-inference (TEI): embed, predict, rerank, similarity, info and health."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Mapping, Optional, Sequence

import numpy as np

from traceserve_runtime import __version__
from traceserve_runtime.errors import InputTooLong, InvalidRequest, ModelFailure, TraceserveError
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Document, Form, Refusal, Served
from traceserve_runtime.protocols.fields import (
    IGNORED,
    READ,
    FieldPaths,
    Key,
    boolean,
    check_classifies,
    check_reads_vectors,
    check_values,
    foreign_names,
    json_body,
    named_texts,
    pooled,
    read_keys,
    require_key,
    text_requests,
    wrong_task,
)
from traceserve_runtime.protocols.requests import checked_fields, in_words
from traceserve_runtime.protocols.wording import kind_of
from traceserve_runtime.tasks.contract import Answer, Request

_LENGTHS: Dict[str, Key] = {
    "truncate": READ,
    "truncation_direction": Key(neutral=("right", "Right"), why="texts are cut at their end"),
}
_EMBED: Dict[str, Key] = {
    **_LENGTHS,
    "inputs": READ,
    "normalize": Key("normalize"),
    "prompt_name": Key("prompt_name"),
    "dimensions": Key("dimensions"),
    "model": IGNORED,
}
_PREDICT: Dict[str, Key] = {**_LENGTHS, "inputs": READ, "raw_scores": READ}
_RERANK: Dict[str, Key] = {
    **_LENGTHS,
    "query": READ,
    "texts": READ,
    "raw_scores": READ,
    "return_text": Key("return_documents"),
    "top_n": Key("top_k"),  # litellm sends it
}
_SIMILARITY: Dict[str, Key] = {**_LENGTHS, "prompt_name": Key("prompt_name")}

# Kind, status and phrase of errors that have others than ours.
_KINDS = (
    (InputTooLong, "Validation", 413, "Request Entity Too Large"),
    (InvalidRequest, "Validation", 422, "Unprocessable Entity"),
    (ModelFailure, "Backend", 424, "Failed Dependency"),
)


class Errors:
    """The error format of all of them."""

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return the error in TEI's format, with its status codes."""
        words = in_words(_advised(error))
        for kind, name, status, phrase in _KINDS:
            if isinstance(error, kind):
                return Refusal({"error": words, "error_type": name}, status, phrase)
        kind_name = "Validation" if error.status < 500 else "Backend"
        return Refusal.of({"error": words, "error_type": kind_name}, error)


def _advised(error: TraceserveError) -> TraceserveError:
    """Return the error with TEI's own way to have a long text cut."""
    if not isinstance(error, InputTooLong) or "truncate" not in error.ways:
        return error
    return InputTooLong(f'{error.bare}, or send "truncate": true', error.field)


def lengths(value: Mapping[str, object], default: bool = False) -> Dict[str, object]:
    """Return how long texts are treated: TEI truncates them on request and refuses them otherwise."""
    return {"long_inputs": "truncate" if boolean(value, "truncate", default) else "reject"}


class Embed(Errors):
    """Embeds texts, normalized by default; `all_tokens` returns the vectors of each token."""

    def __init__(self, all_tokens: bool = False) -> None:
        self._all = all_tokens

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Make one request per text."""
        check_reads_vectors(served, "embeddings are made")
        value = json_body(parts, headers, served)
        own = {"pooling": "none", "normalize": False} if self._all else {**pooled(served), "normalize": True}
        asked = {**own, **read_keys(value, _EMBED), **lengths(value)}
        parameters = check_values(asked, served, foreign_names(_EMBED))
        requests = text_requests(named_texts(value, "inputs"), parameters, served, group)
        return Body(requests, _TeiVectors({"text": "inputs"}, foreign_names(_EMBED), all_tokens=self._all))


@dataclass(frozen=True)
class _TeiVectors(FieldPaths):
    all_tokens: bool = False

    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return the vectors in order."""
        values = (answer.value for answer in answers)
        return [value[0] if self.all_tokens and isinstance(value, list) else value for value in values]


class Predict(Errors):
    """Scores all labels of texts or pairs of texts, best first."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Make one request per text or pair."""
        check_classifies(served)
        value = json_body(parts, headers, served)
        parameters = check_values(
            {**read_keys(value, _PREDICT), **lengths(value), "top_k": None}, served, foreign_names(_PREDICT)
        )
        parameters["function_to_apply"] = _function(value, served)
        inputs = require_key(value, "inputs")
        is_list, named = False, [(inputs, "inputs")]
        if isinstance(inputs, list) and any(isinstance(item, list) for item in inputs):
            is_list, named = True, [(item, f"inputs[{i}]") for i, item in enumerate(inputs)]
        requests = [Request(_text_or_pair(item, served, where), parameters, group, where) for item, where in named]
        return Body(requests, _Labels({}, {}, is_list=is_list))


def _function(value: Mapping[str, object], served: Served) -> str:
    """Return how outputs become scores: unless raw ones are requested, TEI applies the sigmoid to one output and the softmax
    to several, whatever the model's own function (core/src/infer.rs).

    It does not know of independent labels, whose sigmoids are kept here.
    """
    if boolean(value, "raw_scores"):
        return "none"
    independent = served.manifest.parameters.get("function_to_apply") == "sigmoid"
    return "sigmoid" if independent or len(served.manifest.labels) < 2 else "softmax"


def _text_or_pair(item: object, served: Served, where: str) -> Mapping[str, object]:
    texts = item if isinstance(item, list) else [item]
    if not 1 <= len(texts) <= 2:
        raise InvalidRequest("an input is a text, or a list of one text or two", where)
    names = [field.name for field in served.task.fields]
    if len(texts) > len(names):
        raise InvalidRequest("this model does not read pairs of texts", where)
    return checked_fields(dict(zip(names, texts)), served.task, where)


@dataclass(frozen=True)
class _Labels(FieldPaths):
    is_list: bool = False

    def field_path(self, index: int, where: str, name: Optional[str]) -> Optional[str]:
        """Return the path of the text or pair."""
        return where or None

    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return one list of labels, or one per text."""
        return [answer.value for answer in answers] if self.is_list else answers[0].value


class TeiRerank(Errors):
    """Ranks texts by a query, best first, at the path of `ranking.Rerank`."""

    def read_value(self, value: Mapping[str, object], served: Served, group: int) -> Body:
        """Read one request, whose body is already parsed."""
        function = _function(value, served)
        asked = {**read_keys(value, _RERANK), **lengths(value), "sort": True, "function_to_apply": function}
        return ranking(
            value, "texts", asked, _RERANK, served, group, _TeiRanks({"documents": "texts"}, foreign_names(_RERANK))
        )


def ranking(
    value: Mapping[str, object],
    texts: str,
    asked: Mapping[str, object],
    keys: Mapping[str, Key],
    served: Served,
    group: int,
    form: Form,
) -> Body:
    """Return the body for a query and the list of `texts`."""
    if not served.task.has_field("documents"):
        raise wrong_task(served, "texts are ranked", "text_ranking")
    fields = {"query": require_key(value, "query"), "documents": require_key(value, texts)}
    try:
        fields = dict(checked_fields(fields, served.task, ""))
    except InvalidRequest as error:
        raise InvalidRequest(error.message, form.field_path(0, "", error.field)) from None
    return Body([Request(fields, check_values(asked, served, foreign_names(keys)), group)], form)


@dataclass(frozen=True)
class _TeiRanks(FieldPaths):
    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return the ranks as the task returns them."""
        return answers[0].value


class Similarity(Errors):
    """Compares a sentence with others by the cosines of their vectors."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Make one request per sentence, the source first."""
        value = json_body(parts, headers, served)
        read_keys(value, {"inputs": READ, "parameters": READ})
        options = value.get("parameters") or {}
        if not isinstance(options, dict):
            raise InvalidRequest(f'"parameters" should be an object, not {kind_of(options)}', "parameters")
        asked = {**read_keys(options, _SIMILARITY, "parameters"), **lengths(options, default=True)}
        return similarity(require_key(value, "inputs"), asked, served, group)


def similarity(inputs: object, asked: Mapping[str, object], served: Served, group: int) -> Body:
    """Return the body of `{"source_sentence", "sentences"}`."""
    check_reads_vectors(served, "sentences are compared")
    if not isinstance(inputs, dict):
        raise InvalidRequest(
            '"inputs" should be an object like {"source_sentence": "...", "sentences": ["..."]}', "inputs"
        )
    read_keys(inputs, {"source_sentence": READ, "sentences": READ}, "inputs")
    sentences = require_key(inputs, "sentences", "inputs")
    if not isinstance(sentences, list) or not sentences:
        raise InvalidRequest('"sentences" should be a list of texts, one at least', "inputs.sentences")
    source = require_key(inputs, "source_sentence", "inputs")
    named = [(source, "inputs.source_sentence"), *((s, f"inputs.sentences[{i}]") for i, s in enumerate(sentences))]
    if asked.get("pooling") == "none":
        raise InvalidRequest(
            '"pooling" is none, but sentences are compared by one vector each; leave it out', "parameters.pooling"
        )
    parameters = check_values({**pooled(served), **asked, "normalize": True}, served, {}, "parameters")
    return Body(text_requests(named, parameters, served, group), _Cosines(root="parameters"))


@dataclass(frozen=True)
class _Cosines(FieldPaths):
    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return one number per sentence except the source."""
        source, *others = [np.array(answer.value) for answer in answers]
        return [float(source @ other) for other in others]


class Info(Errors):
    """Describes the served model."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Document:
        """Ignore the body."""
        manifest = served.manifest
        kinds: Dict[str, JsonObject] = {}
        if served.task.reads_vectors:
            kinds["embedding"] = {"pooling": manifest.parameters.get("pooling", "none")}
        elif served.task.has_field("documents"):
            kinds["reranker"] = {"id2label": {}, "label2id": {}}
        elif manifest.labels:
            names = {str(i): label for i, label in enumerate(manifest.labels)}
            kinds["classifier"] = {"id2label": names, "label2id": {label: int(i) for i, label in names.items()}}
        return Document(
            {
                "model_id": served.name,
                "model_sha": manifest.source.revision,
                "model_dtype": manifest.dtype,
                "model_type": kinds or {served.task.name: {}},
                "max_input_length": manifest.max_length,
                "max_client_batch_size": manifest.max_rows,
                "auto_truncate": False,
                "version": __version__,
            }
        )


class Health(Errors):
    """Answers while the worker is alive."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Document:
        """Ignore the body."""
        return Document({"status": "ok"})

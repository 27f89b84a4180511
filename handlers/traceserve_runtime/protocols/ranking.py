"""Jina's and Cohere's rankings; vLLM's scores of pairs and classes of texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, List, Mapping, Sequence

from traceserve_runtime.errors import InvalidRequest, TraceserveError
from traceserve_runtime.json_types import Json, json_objects
from traceserve_runtime.protocols import bodies, tei
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Refusal, Served
from traceserve_runtime.protocols.fields import (
    IGNORED,
    READ,
    FieldPaths,
    Key,
    boolean,
    check_classifies,
    check_values,
    foreign_names,
    json_body,
    named_texts,
    read_keys,
    require_key,
    text_requests,
    wrong_task,
)
from traceserve_runtime.protocols.openai.shared import OpenAiErrors, head, plain_message, refusal_of, usage
from traceserve_runtime.protocols.requests import checked_fields
from traceserve_runtime.tasks.contract import Answer, Request

_RERANK: Dict[str, Key] = {
    "model": IGNORED,
    "user": IGNORED,
    "query": READ,
    "documents": READ,
    "top_n": Key("top_k"),
    "return_documents": READ,
    "max_tokens_per_doc": Key(),
    "max_chunks_per_doc": Key(),
    "rank_fields": Key(neutral=([],)),
    "truncation": Key(neutral=(True,)),
    "priority": IGNORED,
}
_SCORE: Dict[str, Key] = {
    "model": IGNORED,
    "user": IGNORED,
    "text_1": READ,
    "text_2": READ,
    "encoding_format": Key(neutral=("float",)),
}
_CLASSIFY: Dict[str, Key] = {"model": IGNORED, "user": IGNORED, "input": READ}


class _RankErrors:
    """The error format of Jina's and Cohere's clients."""

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return the error by the names that either reads."""
        message = plain_message(error)
        return refusal_of(error, message=message, detail=message)


class Rerank:
    """`{"query", "documents", "top_n"}` to `{"results": [{"index", "relevance_score"}]}`, best first; or a TEI call,
    which has "texts" at the same path."""

    _tei, _ranks = tei.TeiRerank(), _RankErrors()

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Read one request."""
        value = json_body(parts, headers, served)
        if _is_tei(value):
            return replace(self._tei.read_value(value, served, group), errors=self._tei)
        asked: Dict[str, object] = {
            **read_keys(value, _RERANK),
            "sort": True,
            "return_documents": boolean(value, "return_documents"),
        }
        documents = [_document(item, f"documents[{i}]") for i, item in enumerate(_list(value, "documents"))]
        form = _Ranks({}, foreign_names(_RERANK))
        body = tei.ranking({**value, "documents": documents}, "documents", asked, _RERANK, served, group, form)
        return replace(body, errors=self._ranks)

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return the error in the caller's format."""
        try:
            value = bodies.read_body(parts, headers, served.task, served.manifest.max_rows)
        except TraceserveError:  # whose body nobody can read
            value = None
        return (self._tei if _is_tei(value) else self._ranks).error(error, parts, headers, served)


def _is_tei(value: object) -> bool:
    return isinstance(value, dict) and "texts" in value and "documents" not in value


def _list(value: Mapping[str, object], name: str) -> List[object]:
    found = require_key(value, name)
    if not isinstance(found, list):
        raise InvalidRequest(f'"{name}" should be a list', name)
    return found


def _document(item: object, where: str) -> object:
    """Return a document's text, which may be wrapped in an object."""
    if isinstance(item, dict):
        read_keys(item, {"text": READ}, where)
        return require_key(item, "text", where)
    return item


@dataclass(frozen=True)
class _Ranks(FieldPaths):
    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return Jina's format with Cohere's id."""
        results = [
            {
                "index": each["index"],
                "relevance_score": each["score"],
                **({"document": {"text": each["text"]}} if "text" in each else {}),
            }
            for each in json_objects(answers[0].value)
        ]
        made = head("rerank-", "list", served)
        tokens = answers[0].tokens
        return {
            "id": made["id"],
            "model": served.name,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "meta": {"api_version": {"version": "2"}, "tokens": {"input_tokens": tokens}},
        }


class Score(OpenAiErrors):
    """Scores pairs of one or several texts with others: `{"data": [{"index", "score"}]}`, one per pair."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Make one request per pair."""
        if not served.task.has_field("documents"):
            raise wrong_task(served, "pairs are scored", "text_ranking")
        value = json_body(parts, headers, served)
        parameters = check_values(read_keys(value, _SCORE), served, foreign_names(_SCORE))
        first, second = ([text for text, _ in named_texts(value, name)] for name in ("text_1", "text_2"))
        if len(first) not in (1, len(second)):
            raise InvalidRequest("text_1 is one text, or as many as text_2", "text_1")
        pairs = zip(first * len(second) if len(first) == 1 else first, second)
        requests = []
        for i, (one, two) in enumerate(pairs):
            try:
                fields = checked_fields({"query": one, "documents": [two]}, served.task, "")
            except InvalidRequest as error:
                raise InvalidRequest(error.message, "text_1" if error.field == "query" else f"text_2[{i}]") from None
            requests.append(Request(fields, parameters, group, ""))
        return Body(requests, _Scores({"query": "text_1", "documents": "text_2"}, {}))


@dataclass(frozen=True)
class _Scores(FieldPaths):
    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return the scores in order."""
        data = [
            {"index": i, "object": "score", "score": json_objects(each.value)[0]["score"]}
            for i, each in enumerate(answers)
        ]
        return {**head("score-", "list", served), "data": data, "usage": usage(answers)}


class Classify(OpenAiErrors):
    """Classifies texts: `{"data": [{"index", "label", "probs", "num_classes"}]}`."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Make one request per text."""
        check_classifies(served)
        value = json_body(parts, headers, served)
        parameters = check_values({**read_keys(value, _CLASSIFY), "top_k": None}, served, {})
        requests = text_requests(named_texts(value, "input"), parameters, served, group)
        return Body(requests, _Classes({"text": "input"}, {}))


@dataclass(frozen=True)
class _Classes(FieldPaths):
    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return each text's best label, and all scores in the model's order."""
        labels = served.manifest.labels
        data = []
        for i, answer in enumerate(answers):
            ranked = json_objects(answer.value)
            scores = {item["label"]: item["score"] for item in ranked}
            probs = [scores[label] for label in labels]
            data.append({"index": i, "label": ranked[0]["label"], "probs": probs, "num_classes": len(labels)})
        return {**head("classify-", "list", served), "data": data, "usage": usage(answers)}

"""OpenAPI 3.1 description of the served model, made from the task's fields and parameters and the archive's labels; and
a page that shows it."""

from __future__ import annotations

from typing import Dict, List, Mapping, Sequence

from traceserve_runtime import __version__
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.explaining.answers import METHODS
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Document, Refusal, Served
from traceserve_runtime.tasks.explained import explained
from traceserve_runtime.tasks.parameters import Field, Parameter

_KINDS: Dict[str, JsonObject] = {
    "text": {"type": "string"},
    "texts": {"type": "array", "items": {"type": "string"}},
    "messages": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
            "required": ["role", "content"],
            "additionalProperties": False,
        },
    },
}
_ERROR: JsonObject = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "type": {"type": "string", "description": "the kind of error"},
                "message": {"type": "string", "description": "what is wrong, and what is legal"},
                "field": {"type": ["string", "null"], "description": "where in the body"},
            },
            "required": ["type", "message", "field"],
        }
    },
    "required": ["error"],
}
_EXPLANATION: JsonObject = {
    "description": "An explanation, or a list of them",
    "type": ["object", "array"],
    "properties": {
        "method": {"type": "string", "enum": list(METHODS)},
        "answer": {"$ref": "#/components/schemas/Answer"},
        "target": {"type": "object", "description": "what is explained"},
        "quantity": {"type": "string"},
        "value": {"type": "number", "description": "of that quantity, for the text"},
        "baseline_value": {"type": "number", "description": "for the text without its words"},
        "words": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "word": {"type": "string"},
                    "field": {"type": "string"},
                    "start": {"type": "integer"},
                    "end": {"type": "integer"},
                    "attribution": {"type": "number"},
                },
            },
        },
        "completeness_error": {"type": "number", "description": "a share of the attributions' sizes"},
        "steps": {"type": "integer"},
        "because": {"type": "string", "description": "why there are no gradients"},
        "windows": {"type": "object", "description": "how many windows the text has, and which are explained"},
    },
}
_STATUSES = {
    "400": "the body cannot be understood",
    "413": "it exceeds the limits of one request",
    "415": "its compression or encoding is not supported",
    "500": "the model failed",
}


class OpenApi:
    """Describes the requests and answers of this archive in OpenAPI 3.1."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Document:
        """Ignore the body."""
        return Document(openapi_document(served))

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return the error in our own protocol's format."""
        return Refusal.of(error.to_json(), error)


class Page(OpenApi):
    """Shows that description as a page for browsers."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Document:
        """Ignore the body."""
        return Document(_PAGE.encode("utf-8"), "text/html; charset=utf-8")


def openapi_document(served: Served) -> JsonObject:
    """Return the OpenAPI document of an archive."""
    manifest, task = served.manifest, served.task
    schemas: Dict[str, Json] = {
        "Fields": _fields(task.fields),
        "Parameters": _parameters(task.all_parameters(), manifest),
        "Request": _request(task.fields),
        "Answer": {"description": (task.__doc__ or "").strip()},
        "Error": _ERROR,
    }
    explaining: Dict[str, Json] = {}
    if task.explains is not None:
        more = explained(task)
        schemas["ExplanationParameters"] = _parameters(more.all_parameters(), manifest)
        schemas["ExplanationFields"] = _fields(task.fields, "Explanation")
        schemas["ExplanationRequest"] = _request(task.fields, "Explanation")
        schemas["Explanation"] = _EXPLANATION
        explaining[f"/explanations/{served.name}/{served.version}"] = _explanations(task.sample_body(manifest.facts))
    if manifest.labels:
        schemas["Label"] = {"type": "string", "enum": list(manifest.labels)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": served.name,
            "version": served.version,
            "summary": f"{task.name}, answered as transformers' pipeline {task.pipeline} does",
            "description": f"Texts of up to {manifest.max_length:,} tokens; {manifest.dtype}; traceserve {__version__}.",
        },
        "servers": [{"url": f"/predictions/{served.name}/{served.version}"}],
        "paths": {
            "/": {"post": {"tags": [task.name], **_operation(task.sample_body(manifest.facts))}},
            **explaining,
            **_documents(),
        },
        "components": {"schemas": schemas},
    }


def _parameters(parameters: Sequence[Parameter], manifest: Manifest) -> JsonObject:
    return {
        "type": "object",
        "properties": {own.name: {**own.schema, **_default(own, manifest)} for own in parameters},
        "additionalProperties": False,
    }


def _default(parameter: Parameter, manifest: Manifest) -> JsonObject:
    """Return a parameter's default: the archive's own or the task's, if any."""
    own = {"long_inputs": manifest.long_inputs, **manifest.parameters}
    value = own.get(parameter.name, parameter.default)
    return {} if value is None and parameter.name not in own else {"default": value}


def _fields(fields: Sequence[Field], kind: str = "") -> JsonObject:
    return {
        "type": "object",
        "properties": {
            **{field.name: {**_KINDS[field.kind], "description": field.description} for field in fields},
            "parameters": {"$ref": f"#/components/schemas/{kind}Parameters"},
        },
        "required": [field.name for field in fields if field.required],
        "additionalProperties": False,
    }


def _request(fields: Sequence[Field], kind: str = "") -> JsonObject:
    """Describe a request: a text if one is enough, fields, a list of these, or an envelope with common parameters."""
    single: List[JsonObject] = [{"$ref": f"#/components/schemas/{kind}Fields"}]
    if sum(field.required for field in fields) <= 1 and fields[0].kind == "text":
        single.append({"type": "string"})
    several: JsonObject = {"type": "array", "items": {"anyOf": single}, "minItems": 1}
    envelope: JsonObject = {
        "type": "object",
        "properties": {
            "inputs": {"anyOf": [*single, several]},
            "parameters": {"$ref": f"#/components/schemas/{kind}Parameters"},
        },
        "required": ["inputs"],
        "additionalProperties": False,
    }
    return {"anyOf": [*single, several, envelope]}


def _operation(sample: JsonObject) -> JsonObject:
    return {
        "operationId": "predict",
        "summary": "Ask the model",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/Request"}, "example": dict(sample)}
            },
        },
        "responses": {
            "200": {
                "description": "the answer, or a list of answers in the order of the requests",
                "headers": {
                    "X-Truncated": {
                        "description": "by request and field, the characters [start, end) that the model did not read; "
                        'beyond 4,096 bytes {"requests": N}, of how many requests',
                        "schema": {"type": "string"},
                    }
                },
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}},
                    "text/plain": {"schema": {"type": "string"}},
                },
            },
            **_refusals(_STATUSES),
        },
    }


def _refusals(statuses: Mapping[str, str]) -> JsonObject:
    """Describe what is answered instead, by status."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": said, "content": error} for status, said in statuses.items()}


def _explanations(sample: JsonObject) -> JsonObject:
    """Describe the path for explanations, which is not below that of predictions."""
    body: JsonObject = {
        "schema": {"$ref": "#/components/schemas/ExplanationRequest"},
        "example": dict(sample),
    }
    said = "the explanation, or a list of explanations in the order of the requests"
    content: JsonObject = {"application/json": {"schema": {"$ref": "#/components/schemas/Explanation"}}}
    return {
        "servers": [{"url": "/"}],
        "post": {
            "operationId": "explain",
            "summary": "Ask what each word added to the answer",
            "requestBody": {"required": True, "content": {"application/json": body}},
            "responses": {
                "200": {"description": said, "content": content},
                **_refusals({**_STATUSES, "503": "it was out of its time"}),
            },
        },
    }


def _documents() -> JsonObject:
    """Describe the paths without a body."""
    found = {
        "/openapi.json": ("openapi", "This description", "application/json"),
        "/docs": ("docs", "This description, to be read", "text/html"),
        "/health": ("health", "Whether the worker answers", "application/json"),
        "/info": ("info", "What is served", "application/json"),
        "/v1/models": ("models", "What is served, as OpenAI's clients read it", "application/json"),
    }
    return {
        path: {
            "get": {
                "operationId": name,
                "summary": summary,
                "responses": {"200": {"description": "the document", "content": {media: {}}}},
            }
        }
        for path, (name, summary, media) in found.items()
    }


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>API</title><style>
body {font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222}
table {border-collapse: collapse}
td {padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top}
textarea {width: 100%; height: 9rem; font: 14px monospace}
pre {background: #f5f5f5; padding: .8rem; overflow: auto; white-space: pre-wrap}
</style></head><body><h1 id="title"></h1><p id="about"></p>
<h2>Try it</h2><textarea id="body" aria-label="request body"></textarea>
<p><button id="send">POST</button> <span id="url"></span></p><pre id="answer"></pre>
<h2>Fields</h2><table id="fields"></table>
<h2>Parameters</h2><table id="parameters"></table>
<h2>Other paths</h2><table id="paths"></table>
<p><a href="openapi.json">openapi.json</a></p>
<script>
const at = id => document.getElementById(id);
const row = (table, cells) => {
  const line = table.insertRow();
  for (const cell of cells) line.insertCell().textContent = cell;
};
const range = s => [s.type, s.minimum ?? "", s.maximum ? "to " + s.maximum : ""].join(" ").trim();
const legal = s => (s.anyOf || [s]).map(one => one.enum ? one.enum.join(", ") : range(one)).join(", or ");
fetch("openapi.json").then(reply => reply.json()).then(api => {
  const {Fields, Parameters} = api.components.schemas, url = api.servers[0].url;
  document.title = at("title").textContent = api.info.title + " " + api.info.version;
  at("about").textContent = api.info.summary + ". " + api.info.description;
  at("url").textContent = url;
  const content = api.paths["/"].post.requestBody.content["application/json"];
  at("body").value = JSON.stringify(content.example, null, 2);
  for (const [name, s] of Object.entries(Fields.properties))
    if (name !== "parameters") row(at("fields"), [name, Fields.required.includes(name) ? "required" : "", s.description]);
  for (const [name, s] of Object.entries(Parameters.properties)) row(at("parameters"), [name, legal(s), s.description]);
  for (const [path, own] of Object.entries(api.paths)) if (own.get) row(at("paths"), ["GET " + path, own.get.summary]);
  at("send").onclick = async () => {
    const headers = {"Content-Type": "application/json"};
    const reply = await fetch(url, {method: "POST", headers, body: at("body").value});
    at("answer").textContent = reply.status + "\\n" + await reply.text();
  };
});
</script></body></html>
"""

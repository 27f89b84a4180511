"""The free-form parts of a manifest, receipt and runtime: what commands read of them has the kinds that a build writes."""

from __future__ import annotations

from typing import Mapping

from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.manifest import MANIFEST_FILE, Manifest
from traceserve_runtime.runtimes import aot_inductor

_TOKENS = {"tokens": int, "tokens_changed": int}
# Each kind is a type, a list of one kind, or an object with the kinds of its keys.
_RECEIPT: Mapping[str, object] = {
    "passed": bool,
    "cells": int,
    "answers": int,
    "answers_changed": int,
    "own_answers": int,
    "own_answers_changed": int,
    "largest_difference": float,
    "limits": {"difference": float},
    "variants": [dict],
    "in_float32": [str],
    "license": {"name": str, "file": str},
    "along_texts": {**_TOKENS, "near_ties": int, "mean_drift": float, "own": _TOKENS},
}
_RUNTIME: Mapping[str, object] = {aot_inductor.MACHINE: str, aot_inductor.INSTRUCTIONS: [str]}
_NULL = ("license", "largest_difference", "mean_drift")  # or null: no licence, and no finite number
_LACKING = ("own",)  # an object need not have it; nor a whole part any of its keys
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "an object"}


def check_free_form(manifest: Manifest) -> None:
    """Raise InvalidManifest for parts that no build wrote."""
    for part, content, kinds in (("receipt", manifest.receipt, _RECEIPT), ("runtime", manifest.runtime, _RUNTIME)):
        for key, kind in kinds.items():
            if key in content:
                _check_value(content, key, kind, part)


def _check_value(content: Mapping[str, object], key: str, kind: object, where: str) -> None:
    value = content.get(key)
    if not (key in content and value is None and key in _NULL):
        _check_kind(value, kind, f"{where}.{key}")


def _check_kind(value: object, kind: object, where: str) -> None:
    if isinstance(kind, dict):
        _check_kind(value, dict, where)
        assert isinstance(value, dict)
        for key, inner in kind.items():
            if key in value or key not in _LACKING:
                _check_value(value, key, inner, where)
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise _refused(where, "a list")
        for number, item in enumerate(value):
            _check_kind(item, kind[0], f"{where}[{number}]")
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise _refused(where, _WORDS[kind])  # type: ignore[index]  # a type


def _refused(where: str, wanted: str) -> InvalidManifest:
    return InvalidManifest(f"{MANIFEST_FILE}: {where} should be {wanted}; build the archive again")

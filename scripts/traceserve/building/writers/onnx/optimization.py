"""Graph fusions: by ONNX Runtime when loading, and before that by its tool for transformers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Dict, NamedTuple, Tuple

from traceserve_runtime.runtimes.onnx import onnx_runtime

if TYPE_CHECKING:
    import onnx
    from transformers import PreTrainedModel


class Level(NamedTuple):
    """ONNX Runtime's optimization when loading the graph; whether its tool for transformers runs before, and
    approximates."""

    session: str
    tool: bool = False
    fast_gelu: bool = False


LEVELS = {
    "none": Level("ORT_DISABLE_ALL"),
    "basic": Level("ORT_ENABLE_BASIC"),
    "extended": Level("ORT_ENABLE_EXTENDED"),
    "transformers": Level("ORT_ENABLE_EXTENDED", tool=True),
    "fast_gelu": Level("ORT_ENABLE_EXTENDED", tool=True, fast_gelu=True),
}
# The tool's names of families with their own patterns; others use BERT's.
_FAMILIES = {"gpt2": "gpt2", "bart": "bart", "mbart": "bart", "t5": "t5", "mt5": "t5"}


def fuse(
    model: onnx.ModelProto, source: PreTrainedModel, level: Level, loop: bool
) -> Tuple[onnx.ModelProto, Dict[str, int]]:
    """Return the ONNX model fused for the CPU at this level, and the number of each fused operator.

    Attention is not fused in a loop, since that changes the state's shape.
    """
    if not level.tool:
        return model, {}
    onnx_runtime()  # without telemetry
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import AttentionMaskFormat, FusionOptions

    config = source.config
    kind = _FAMILIES.get(config.model_type, "bert")
    options = FusionOptions(kind)
    options.enable_attention = options.enable_rotary_embeddings = not loop
    options.attention_mask_format = AttentionMaskFormat.AttentionMask  # its default assumes padding at the end
    options.enable_gelu_approximation = level.fast_gelu
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it logs every pattern that it does not find
    try:
        result = optimizer.optimize_model(
            model,
            model_type=kind,
            num_heads=getattr(config, "num_attention_heads", 0) or 0,
            hidden_size=getattr(config, "hidden_size", 0) or 0,
            optimization_options=options,
            opt_level=0,
            use_gpu=False,
        )
        result.topological_sort()
        counts = result.get_fused_operator_statistics()
    finally:
        logging.disable(before)
    return result.model, {kind: count for kind, count in counts.items() if count}

"""Feature extraction: a text to the vectors of its tokens, or to one vector."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Sequence

import numpy as np

from traceserve_runtime.batching import Arrays
from traceserve_runtime.errors import Unsupported
from traceserve_runtime.tasks.contract import ModelFacts, Request, Task, only_whole
from traceserve_runtime.tasks.parameters import Field, Output, Parameter
from traceserve_runtime.tasks.scores import average
from traceserve_runtime.tokenization import Row

# One row's last hidden state, (length, hidden), to one vector, (hidden).
POOLINGS: Dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cls": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(axis=0),
}


class FeatureExtraction(Task):
    """Without pooling a nested list of shape (1, length, hidden), as the pipeline gives; with it a list (hidden).

    Several windows of one text are pooled each and then averaged; without pooling they cannot be merged.
    """

    name = "feature_extraction"
    auto_model = "AutoModel"
    pipeline = "feature-extraction"
    fields = (
        Field("text", True, "the text"),
        Field("text_pair", False, "the second text, for a model of text pairs"),
    )
    outputs = (Output("last_hidden_state", per_token=True),)
    parameters = (
        Parameter(
            "pooling",
            str,
            "from the vectors of the tokens to one vector; by default as the model says, or none",
            ("none", *POOLINGS),
        ),
        Parameter("normalize", bool, "scale each vector to length 1; by default as the model says, or not"),
    )
    sample = {"text": "A small boat crosses the bay at sunrise."}

    @classmethod
    def defaults(cls, model: ModelFacts) -> Dict[str, Any]:
        """No pooling, as the pipeline; or what a checkpoint of sentence-transformers says in its own files."""
        modules: Any = model.read_json("modules.json")
        if modules is None:
            return {"pooling": "none", "normalize": False}
        kinds = {module["type"].rsplit(".", 1)[-1]: module.get("path", "") for module in modules}
        unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
        if unknown:
            raise Unsupported(
                f"this sentence-transformers checkpoint has a module {', '.join(unknown)}, which is not supported"
            )
        pooling = _pooling(model.read_json(f"{kinds['Pooling']}/config.json")) if "Pooling" in kinds else "none"
        return {"pooling": pooling, "normalize": "Normalize" in kinds}

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
        pooling = self.parameter(request, "pooling")
        if pooling == "none":
            only_whole(
                rows,
                f"the text has {len(rows)} windows, whose token vectors cannot be merged; ask for a pooling (cls, mean), "
                'or for "long_inputs": "truncate"',
            )
            vectors = outputs[0]["last_hidden_state"]
        else:
            pool = POOLINGS[pooling]
            vectors = average([pool(output["last_hidden_state"]) for output in outputs], rows)
        if self.parameter(request, "normalize"):
            # As torch.nn.functional.normalize does, with its epsilon.
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return [vectors.tolist()] if pooling == "none" else vectors.tolist()

    def same(self, answer: Any, other: Any) -> bool:
        """A cosine above 0.999 for every vector."""
        one, two = (np.atleast_2d(np.squeeze(np.asarray(a, dtype=np.float64))) for a in (answer, other))
        if one.shape != two.shape:
            return False
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
        return bool(np.all((one * two).sum(axis=-1) > 0.999 * norms))


def _pooling(facts: Optional[Dict[str, Any]]) -> str:
    """The pooling that a sentence-transformers Pooling module's configuration names; raises Unsupported."""
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "mean": "mean", "cls": "cls"}
    modes = [key for key, value in (facts or {}).items() if key.startswith("pooling_mode_") and value is True]
    named = (facts or {}).get("pooling_mode")
    modes += [named] if isinstance(named, str) else []
    if len(modes) != 1 or modes[0] not in names:
        raise Unsupported(
            f"this sentence-transformers checkpoint pools by {', '.join(modes) or 'nothing that its files name'}; supported "
            f"are {', '.join(names)}"
        )
    return names[modes[0]]

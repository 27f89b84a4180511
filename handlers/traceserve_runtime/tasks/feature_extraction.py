"""Feature extraction: a text to its tokens' vectors, or to one vector."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import numpy as np

from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError, Unsupported
from traceserve_runtime.json_types import Json
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import ModelFacts, Parts, Request, Task, only_whole, without_prefix
from traceserve_runtime.tasks.embedding import POOLINGS, apply, normalized, pool
from traceserve_runtime.tasks.parameters import Field, Output, Parameter
from traceserve_runtime.tasks.scores import average
from traceserve_runtime.texts.limits import most_of_a_row, refused_groups
from traceserve_runtime.texts.rows import Encoded, Row, Segments
from traceserve_runtime.texts.tokenization import TextTokenizer

# The facts of a checkpoint that is not from sentence-transformers.
_NONE: Dict[str, object] = {"prompts": {}, "include_prompt": True, "layers": [], "arrays": None, "dimensions": None}
# In the token vectors that one HTTP request is answered with, 60 MB of JSON, which take a second or two to write; a text of
# max_length may have more.
_MOST_NUMBERS = 3 << 20
_PROMPTS = 8  # whose tokens are counted once: the texts of one request share theirs


class FeatureExtraction(Task):
    """Without pooling, a nested list of shape (1, length, hidden), as the pipeline returns; with it, a list (hidden).

    Several windows of one text are each pooled, then averaged; without pooling they cannot be merged.
    """

    name = "feature_extraction"
    auto_model = "AutoModel"
    reads_vectors = True
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
            "how token vectors become one vector; by default the model's own pooling, or none",
            ("none", *POOLINGS),
        ),
        Parameter("prompt_name", str, "which of the model's prompts is prepended; by default the model's own choice"),
        Parameter("prompt", str, "a text to prepend, instead of the model's own prompts"),
        Parameter("normalize", bool, "scale each vector to length 1; by default the model's own setting, or false"),
        Parameter("dimensions", int, "keep only this many first numbers of a pooled vector, for models trained for it"),
    )
    sample = {"text": "A small boat crosses the bay at sunrise."}

    def __init__(self, manifest: Manifest, tokenizer: TextTokenizer) -> None:
        super().__init__(manifest, tokenizer)
        self._arrays: Dict[str, np.ndarray] = {}
        self._size: Optional[int] = None  # of a token's vector, once the model has run
        self._tokens_of_prompt = lru_cache(_PROMPTS)(self._count_tokens)

    @classmethod
    def defaults(cls, model: ModelFacts) -> Dict[str, object]:
        """Return no pooling, like the pipeline; or the settings in a sentence-transformers checkpoint's own files."""
        own = model.embedding
        name = own.get("prompt_name")
        return {
            "pooling": own.get("pooling", "none"),
            "normalize": own.get("normalize", False),
            **({} if name is None else {"prompt_name": name}),
        }

    @classmethod
    def archive_defaults(cls, model: ModelFacts, chosen: Mapping[str, object]) -> Dict[str, object]:
        """Refuse more dimensions than the model's vectors have, where their size is known."""
        wanted, size = chosen.get("dimensions"), model.embedding.get("size")
        if isinstance(wanted, int) and isinstance(size, int) and wanted > size:
            raise Unsupported(f"parameters: dimensions is {wanted:,}, but this model's vectors have {size:,} numbers")
        return super().archive_defaults(model, chosen)

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        """Return sentence-transformers' other facts: prompts, and the layers after the pooling."""
        return {name: model.embedding[name] for name, none in _NONE.items() if model.embedding.get(name, none) != none}

    def _fact(self, name: str) -> Any:
        """Return the checkpoint's fact, or the default for a transformers checkpoint."""
        return self.manifest.facts.get(name, _NONE[name])

    def read_files(self, folder: Path) -> None:
        name = self._fact("arrays")
        if name is not None:
            with np.load(folder / name, allow_pickle=False) as stored:
                self._arrays = {key: stored[key] for key in stored.files}

    def prompt(self, request: Request) -> str:
        """Return the request's prompt; raises InvalidRequest for a name that the model lacks."""
        prompts = self._fact("prompts")
        for parameters, where in ((request.parameters, "parameters.prompt_name"), (self.manifest.parameters, None)):
            name = parameters.get("prompt_name")
            if name is not None and name not in prompts:
                known = ", ".join(prompts) or "none"
                raise InvalidRequest(f"this model has no prompt {name}; it has: {known}", where)
            if "prompt" in parameters:
                return str(parameters["prompt"])
            if name is not None:
                return str(prompts[name])
        return ""

    def segments(self, request: Request) -> List[Segments]:
        if "dimensions" in request.parameters and self.parameter(request, "pooling") == "none":
            raise InvalidRequest(
                "dimensions are those of a pooled vector; ask for a pooling (cls, mean) too", "parameters.dimensions"
            )
        prompt = self.prompt(request)
        most = most_of_a_row(self.manifest.max_length)
        if "prompt" in request.parameters and len(prompt) > most:
            raise InputTooLong(
                f"the prompt has {len(prompt):,} characters; it may have {most:,}; shorten it", "parameters.prompt"
            )
        return [part._replace(text=prompt + part.text) for part in super().segments(request)]

    def tokenize(self, requests: Sequence[Request], parts: Sequence[Parts]) -> List[Union[Encoded, TraceserveError]]:
        encoded = super().tokenize(requests, parts)
        return [
            item if isinstance(item, TraceserveError) else without_prefix(item, "text", len(self.prompt(request)))
            for request, item in zip(requests, encoded)
        ]

    def refused_answers(
        self, requests: Sequence[Request], encoded: Sequence[Union[Encoded, TraceserveError]]
    ) -> Dict[Optional[int], InputTooLong]:
        """Refuse too many token vectors. Before the first run their size is not known."""
        measured = (
            (request.group, len(item.rows), sum(row.length for row in item.rows))
            for request, item in zip(requests, encoded)
            if isinstance(item, Encoded) and self.parameter(request, "pooling") == "none"
        )
        return refused_groups(measured, self._check_numbers)

    def _check_numbers(self, rows: int, tokens: int) -> Optional[InputTooLong]:
        size = self._size or 0
        most = max(_MOST_NUMBERS, self.manifest.max_length * size)
        if tokens * size <= most:
            return None
        return InputTooLong(
            f"the answer would have {tokens * size:,} numbers, {size:,} for each of {tokens:,} tokens; one request may have "
            f"{most:,}; send fewer texts, or ask for a pooling (cls, mean)",
            "parameters.pooling",
        )

    def keep(self, row: Row, outputs: Arrays) -> Arrays:
        self._size = outputs["last_hidden_state"].shape[-1]
        return outputs

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Json:
        pooling = self.parameter(request, "pooling")
        if pooling == "none":
            only_whole(
                rows,
                f"the text has {len(rows)} windows, whose token vectors cannot be merged; ask for a pooling (cls, mean), "
                'or for "long_inputs": "truncate"',
            )
            vectors = outputs[0]["last_hidden_state"]
        else:
            starts = [self._start(request, row) if row.start == 0 else 0 for row in rows]
            hidden = [output["last_hidden_state"] for output in outputs]
            pooled = average([pool(states, pooling, start) for states, start in zip(hidden, starts)], rows)
            vectors = apply(pooled, self._fact("layers"), self._arrays)
        if self.parameter(request, "normalize"):
            vectors = normalized(vectors)
        dimensions = self.parameter(request, "dimensions") or self._fact("dimensions")
        if dimensions is not None and pooling != "none":
            self._check_dimensions(dimensions, vectors)
            vectors = vectors[:dimensions]
            # Only if one of these was requested, or this archive's configuration has dimensions.
            asked = {"normalize", "dimensions"} & set(request.parameters) or "dimensions" in self.manifest.parameters
            if asked and self.parameter(request, "normalize"):
                vectors = normalized(vectors)
        return [vectors.tolist()] if pooling == "none" else vectors.tolist()

    def _check_dimensions(self, dimensions: int, vectors: np.ndarray) -> None:
        if dimensions > len(vectors):
            raise InvalidRequest(
                f"this model's vectors have {len(vectors):,} numbers, not {dimensions:,}", "parameters.dimensions"
            )

    def _start(self, request: Request, row: Row) -> int:
        """Return the first pooled position: after the prompt and the special tokens before it, if the prompt is
        excluded."""
        prompt = "" if self._fact("include_prompt") else self.prompt(request)
        if not prompt:
            return 0
        special = row.encoding.special_tokens_mask
        return next((i for i, own in enumerate(special) if not own), 0) + self._tokens_of_prompt(prompt)

    def _count_tokens(self, prompt: str) -> int:
        return len(self.tokenizer.token_ids(prompt))

    def answers_with_vector(self, request: Request) -> bool:
        own = {"pooling", "normalize", "dimensions"} & set(request.parameters)
        return not own and bool(self.parameter(request, "pooling") != "none")

    def same(self, answer: Json, other: Json) -> bool:
        """Require a cosine above 0.999 for every vector; one of zeros has none."""
        one, two = (np.atleast_2d(np.squeeze(np.asarray(a, dtype=np.float64))) for a in (answer, other))
        if one.shape != two.shape:
            return False
        lengths, others = (np.linalg.norm(vectors, axis=-1) for vectors in (one, two))
        close = (one * two).sum(axis=-1) > 0.999 * lengths * others
        return bool(np.all(close | ((lengths == 0) & (others == 0))))

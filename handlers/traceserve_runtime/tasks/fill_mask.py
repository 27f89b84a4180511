"""Fill-mask: a text with masked tokens to candidates for them."""

from __future__ import annotations

from functools import lru_cache
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError, Unsupported
from traceserve_runtime.json_types import Json, JsonObject, json_objects
from traceserve_runtime.largest import largest
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays
from traceserve_runtime.softmax import softmax
from traceserve_runtime.tasks.contract import ModelFacts, Parts, Request, Task, without_refused
from traceserve_runtime.tasks.parameters import Field, Output, Parameter, strings
from traceserve_runtime.texts import limits, windows
from traceserve_runtime.texts.filled_texts import FilledTexts
from traceserve_runtime.texts.rows import Row, Segments
from traceserve_runtime.texts.tokenization import TextTokenizer

# The largest size of one run's logits, float32 of shape (batch, length, vocabulary).
_MOST_BYTES = 1 << 28
_MOST_CANDIDATES = 1000  # of all masks of a text; each is returned with the whole text
# In characters, of the texts that one HTTP request is answered with, one for each token. The longest request has room for as
# many tokens of each mask.
_MOST_RETURNED, _LEAST_TOKENS = 1 << 25, 8
_BESIDE = 256  # characters for the rest of a token's answer; to find a token takes as long as some of a text
_LONGEST_TARGET = 256  # in characters; only its first token counts
_SETS_OF_TARGETS = 8  # kept: the texts of one request share theirs


class FillMask(Task):
    """A list of `{"score", "token", "token_str", "sequence"}`, best first; for several masks a list of such lists."""

    name = "fill_mask"
    auto_model = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    cleans_up = True
    fields = (Field("text", True, "the text, with the model's mask token in it"),)
    outputs = (Output("logits", per_token=True),)
    parameters = (
        Parameter("top_k", int, "how many tokens to return for each mask", most=_MOST_CANDIDATES, default=5),
        Parameter("targets", list, "choose only among these words; of a word with several tokens, the first counts"),
    )
    windows_overlap = True
    sample = {"text": "The train to the [MASK] leaves at nine."}

    def __init__(self, manifest: Manifest, tokenizer: TextTokenizer) -> None:
        super().__init__(manifest, tokenizer)
        self._first_ids = lru_cache(_SETS_OF_TARGETS)(self._read_targets)

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        """Return the mask token and the padding; raises Unsupported if the tokenizer has no mask."""
        if "mask" not in model.tokens:
            raise Unsupported("this checkpoint's tokenizer has no mask token, so it cannot answer fill_mask")
        token, token_id = model.tokens["mask"]
        padding = model.tokens["pad"][1] if "pad" in model.tokens else None
        return {"mask_token": token, "mask_id": token_id, "pad_id": padding}

    @classmethod
    def sample_body(cls, facts: Mapping[str, object]) -> JsonObject:
        """Use the model's own mask token."""
        return {"text": cls.sample["text"].replace("[MASK]", facts.get("mask_token", "[MASK]"))}

    @classmethod
    def canary_body(cls, manifest: Manifest) -> JsonObject:
        """Ask for a mask alone, which no max_length cuts off."""
        return {**super().canary_body(manifest), "text": manifest.facts["mask_token"]}

    @property
    def most_tokens(self) -> int:
        return max(1, _MOST_BYTES // (4 * self.tokenizer.vocabulary_size))

    def keep(self, row: Row, outputs: Arrays) -> Arrays:
        """Keep only the masked tokens' logits."""
        return {"logits": outputs["logits"][self._masked(row)]}

    def _masked(self, row: Row) -> List[int]:
        return [i for i, token_id in enumerate(row.encoding.ids) if token_id == self.manifest.facts["mask_id"]]

    def parts(self, requests: Sequence[Request]) -> List[Parts]:
        parts = super().parts(requests)
        sums = limits.GroupSums()
        for request, part in zip(requests, parts):
            if not isinstance(part, TraceserveError):
                sums.add(request.group, *self._returned(request))
        return without_refused(sums.refused(self._check_returned), requests, parts)

    def _returned(self, request: Request) -> Tuple[int, int]:
        """Return how many texts a request is answered with, and their characters, as far as is known before it is read."""
        text, targets = request.inputs["text"], self._targets(request)
        whole = self.long_inputs(request) != "truncate"
        length = len(text) if whole else min(len(text), limits.most_of_a_row(self.manifest.max_length))
        masks = text.count(self.manifest.facts["mask_token"])
        known = self.tokenizer.vocabulary_size if targets is None else len(targets)
        count = min(masks * min(self.parameter(request, "top_k"), known), _MOST_CANDIDATES)
        return count, count * (length + _BESIDE)

    def _check_returned(self, count: int, characters: int) -> Optional[InputTooLong]:
        most = max(_MOST_RETURNED, _LEAST_TOKENS * self.tokenizer.limits.characters)
        if characters <= most:
            return None
        return InputTooLong(
            f"the answer would have {count:,} tokens, each with its whole text; one request may have about "
            f"{count * most // characters:,} with texts of this length; lower top_k, or send fewer texts",
            "parameters.top_k",
        )

    def segments(self, request: Request) -> List[Segments]:
        longest = max(map(len, self._targets(request) or ()), default=0)
        if longest > _LONGEST_TARGET:
            raise InputTooLong(
                f"a target has {longest:,} characters; it may have {_LONGEST_TARGET:,}", "parameters.targets"
            )
        return super().segments(request)

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Json:
        merged = windows.merge_windows(rows)
        own = [row.encoding.ids for row in rows]  # each access converts all of them
        ids = np.array([own[window][position] for window, position, _ in merged])
        masks = np.flatnonzero(ids == self.manifest.facts["mask_id"])
        if not len(masks):
            token = self.manifest.facts["mask_token"]
            raise InvalidRequest(f"the text has no mask token; write {token} for each word to be found", "text")
        top_k = self.parameter(request, "top_k")
        candidates = self._candidates(request, outputs[0]["logits"].shape[-1])
        if len(masks) * min(top_k, len(candidates)) > _MOST_CANDIDATES:
            raise InputTooLong(
                f"the text has {len(masks):,} masks, and top_k is {top_k:,}; one text may have {_MOST_CANDIDATES:,} tokens "
                "for all of its masks; lower top_k, or split the text",
                "parameters.top_k",
            )
        kept = [{position: i for i, position in enumerate(self._masked(row))} for row in rows]
        single = len(masks) == 1
        # With several masks the pipeline shows the others, and so all special tokens. It leaves padding out.
        padding = self.manifest.facts["pad_id"]
        texts = FilledTexts(self.tokenizer, ids[ids != padding].tolist(), skip_special_tokens=single)
        answers = []
        for mask in masks:
            window, position, _ = merged[mask]
            logits = outputs[window]["logits"][kept[window][position]]
            scores = softmax(logits)
            # By logits: many unlikely tokens have a score of 0.
            best = candidates[largest(logits[candidates], top_k)]
            unpadded = int(np.count_nonzero(ids[:mask] != padding))  # the mask's position without padding
            filled = texts.at(unpadded, [None if token == padding else token for token in best.tolist()])
            answers.append(self._ranked(best, scores[best], filled))
        return answers[0] if single else answers

    def _ranked(self, best: np.ndarray, scores: np.ndarray, filled: Sequence[str]) -> Json:
        words = self.tokenizer.decode_each(best[:, None].tolist(), skip_special_tokens=False)
        found = zip(scores.tolist(), best.tolist(), map(self.tokenizer.cleaned, words), filled)
        return [dict(zip(("score", "token", "token_str", "sequence"), each)) for each in found]

    def _targets(self, request: Request) -> Optional[Tuple[str, ...]]:
        targets = self.parameter(request, "targets")
        return None if targets is None else tuple(strings(targets))

    def _candidates(self, request: Request, size: int) -> np.ndarray:
        """Return the ids of the tokens to choose among; `size` is the number that the model knows."""
        targets = self._targets(request)
        if targets is None:
            return np.arange(size)
        found = [token_id for token_id in self._first_ids(targets) if token_id < size]
        if not found:
            raise InvalidRequest('none of the "targets" has a token of this model', "parameters.targets")
        return np.array(found)

    def _read_targets(self, targets: Tuple[str, ...]) -> List[int]:
        """Return the ids of the targets' first tokens, in order."""
        found = set()
        for target in targets:
            token_id = self.tokenizer.token_id(target)
            found |= {token_id} if token_id is not None else set(self.tokenizer.token_ids(target)[:1])
        return sorted(found)

    def same(self, answer: Json, other: Json) -> bool:
        """Require the same best token for each mask, and the same text with it."""
        return _best(answer) == _best(other)

    def from_texts(self, texts: Sequence[str]) -> List[Request]:
        """Mask each text's middle word, and in every third one the last word too.

        Without words, as in Chinese, mask the middle character.
        """
        mask = self.manifest.facts["mask_token"]
        requests = []
        for number, text in enumerate(texts):
            between = " " if " " in text else ""
            words = text.split(" ") if between else list(text)
            if words:
                words[len(words) // 2] = mask
            if number % 3 == 0:
                words[-1:] = [mask]
            if mask in words:
                requests.append(Request({"text": between.join(words)}))
        return requests

    def warm_up_requests(self) -> List[Request]:
        requests = super().warm_up_requests()
        mask = self.manifest.facts["mask_token"]
        texts = [r.inputs["text"].replace("[MASK]", mask) for r in requests]
        # A mask at the beginning, which a short max_length does not cut off.
        return [Request({"text": f"{mask} {text}"}, r.parameters) for text, r in zip(texts, requests)]


def _best(value: Json) -> List[Tuple[Json, Json]]:
    """Return the best token of each mask, and its text."""
    found = [json_objects(ranked)[0] for ranked in _lists(value)]
    return [(each["token"], each["sequence"]) for each in found]


def _lists(value: Json) -> List[Json]:
    """Return the answer's lists, one per mask."""
    return value if isinstance(value, list) and isinstance(value[0], list) else [value]

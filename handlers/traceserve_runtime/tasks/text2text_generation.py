"""Text to text: translation, summaries and the like, by an encoder and a decoder."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

from traceserve_runtime.batching import Arrays
from traceserve_runtime.errors import Unsupported
from traceserve_runtime.tasks.contract import ModelFacts, Request
from traceserve_runtime.tasks.generating import PARAMETERS, Generating, first_id
from traceserve_runtime.tasks.parameters import Field
from traceserve_runtime.tokenization import Row, Segments

_UNSET_LENGTH = 20  # transformers' own max_length, which its pipeline takes for none that the checkpoint sets
_LONGEST_TEXT = 4096  # tokens, for models whose positions have no limit of their own


class Text2TextGeneration(Generating):
    """`{"generated_text"}`: what the model writes to the text. (A T5 wants its own prefix, as "summarize: ", in it.)"""

    name = "text2text_generation"
    auto_model = "AutoModelForSeq2SeqLM"
    pipeline = "text2text-generation"
    loop = "encoder_decoder"
    fields = (Field("text", True, "the text"),)
    parameters = PARAMETERS
    pipeline_defaults = {"num_beams": 4}
    task_specific_params = True
    sample_parameters = {"max_new_tokens": 24}
    sample = {"text": "The train to the coast leaves at a quarter past nine from platform four."}

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, Any]:
        start = first_id(model.generation.get("decoder_start_token_id"), model.config.get("decoder_start_token_id"))
        if start is None:
            start = first_id(model.generation.get("bos_token_id"), model.config.get("bos_token_id"))
        if start is None:
            raise Unsupported("the checkpoint names no token that its decoder begins with (decoder_start_token_id)")
        most = model.config.get("max_position_embeddings") or _LONGEST_TEXT
        facts = super().facts(model)
        if facts["max_length"] == _UNSET_LENGTH:
            facts["max_length"] = None
        return {**facts, "start_id": start, "most_new_tokens": most}

    def segments(self, request: Request) -> List[Segments]:
        self.check_parameters(request)
        prefix = self.manifest.facts["prefix"]
        return [segments._replace(text=prefix + segments.text) for segments in super().segments(request)]

    def prompt(self, row: Row) -> List[int]:
        return [self.manifest.facts["start_id"]]

    def room(self, row: Row) -> int:
        most: int = self.manifest.facts["most_new_tokens"]
        return most

    def text(self, tokens: Sequence[int]) -> str:
        # As its pipeline, which does not clean up.
        return self.tokenizer.decode(tokens, skip_special_tokens=True, raw=True)

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
        return {"generated_text": self.text(outputs[0]["tokens"].tolist())}

    def from_texts(self, texts: Sequence[str]) -> List[Request]:
        """Each text, every other one by beams; the long ones cut."""
        parameters = {**self.gate_parameters, "long_inputs": "truncate"}
        return [Request({"text": text}, {**parameters, "num_beams": 1 + 2 * (i % 2)}) for i, text in enumerate(texts)]

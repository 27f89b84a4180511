"""Text generation: a decoder continues a prompt or a chat."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import Callable, Dict, List, Mapping, Optional, Sequence

from traceserve_runtime.errors import InputTooLong, InvalidRequest
from traceserve_runtime.json_types import Json
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import Answer, Details, ModelFacts, Request
from traceserve_runtime.tasks.generating import NEW_TOKENS_OF_SAMPLE, TAIL, Generating, that_fit
from traceserve_runtime.tasks.generation_parameters import PARAMETERS
from traceserve_runtime.tasks.parameters import Field, Parameter
from traceserve_runtime.texts import chat
from traceserve_runtime.texts.continuation import Continuation
from traceserve_runtime.texts.rows import Row, Segments


class TextGeneration(Generating):
    """A list of one `{"generated_text"}`: the prompt and its continuation, or for a chat its messages and a new one.

    With `stream` the new text arrives in pieces, plain UTF-8, one per chunk of the HTTP response.
    """

    name = "text_generation"
    auto_model = "AutoModelForCausalLM"
    pipeline = "text-generation"
    loop = "decoder"
    padding_side = "left"
    truncation_side = "left"  # the text just before the new one matters most
    longest_default = 2048
    cleans_up = True
    fields = (
        Field("text", False, "the prompt"),
        Field("messages", False, 'or a chat, as [{"role": "user", "content": "..."}]', "messages"),
    )
    parameters = (
        *PARAMETERS,
        Parameter("return_full_text", bool, "return the prompt too", default=True),
        Parameter("stream", bool, "send the text in pieces, as it is written", default=False),
        Parameter("truncate", int, "read no more than this many tokens of the prompt, its last ones"),
    )
    sample = {"text": "Once upon a time there was a little"}
    sample_parameters = {"max_new_tokens": NEW_TOKENS_OF_SAMPLE}

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        return {**super().facts(model), "chat_template": model.chat_template, "tokens": chat.names(model.tokens)}

    @classmethod
    def check(cls, inputs: Mapping[str, object]) -> None:
        if ("text" in inputs) == ("messages" in inputs):
            raise InvalidRequest('send either "text" or "messages"')
        if inputs.get("messages") == []:
            raise InvalidRequest("the chat has no messages", "messages")

    def segments(self, request: Request) -> List[Segments]:
        self.check_parameters(request)
        wanted = self._wanted(request)
        limit = min(self.manifest.max_length - wanted, self._most_read(request) or self.manifest.max_length)
        if limit < 1:
            raise InputTooLong(
                f"{wanted:,} new tokens are asked for, but this model reads and writes {self.manifest.max_length:,} together",
                "parameters.max_new_tokens",
                exceeds_context=True,
            )
        if "text" in request.inputs:
            return [Segments(self.manifest.facts["prefix"] + request.inputs["text"], limit=limit)]
        template = self.manifest.facts["chat_template"]
        if template is None:
            raise InvalidRequest('this model has no chat template; send "text"', "messages")
        text = chat.render(template, self.manifest.facts["tokens"], request.inputs["messages"])
        return [Segments(text, fields=("messages", ""), limit=limit, special=False)]

    @cached_property
    def counted_prefix(self) -> int:
        return len(self.tokenizer.token_ids(self.manifest.facts["prefix"]))

    def prompt(self, row: Row) -> List[int]:
        return list(row.encoding.ids)

    @property
    def longest_text(self) -> int:
        return self.manifest.max_length

    def room(self, row: Row) -> int:
        return self.manifest.max_length - row.length

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def tail(self, prompt: Sequence[int]) -> List[int]:
        return list(prompt[-TAIL:])

    def streams(self, request: Request) -> bool:
        return bool(self.parameter(request, "stream"))

    def value(self, request: Request, text: str, details: Details) -> Json:
        if self.streams(request):
            return text
        told = {"details": details} if self.parameter(request, "details") else {}
        return [{"generated_text": self._whole(request, text), **told}]

    def follows_a_word(self, request: Request) -> bool:
        # A chat's new message follows no word.
        return request.continues and ("text" in request.inputs or request.inputs["messages"][-1]["role"] == "assistant")

    def decoding(self, request: Request) -> Callable[[Sequence[int]], str]:
        # Versions are compared by our own answers, to which `clean_up` does not apply.
        raw = request.continues and not request.clean_up
        return partial(self.tokenizer.decode, skip_special_tokens=True, raw=True) if raw else self.text

    def continuation(
        self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays], answer: Answer
    ) -> Optional[Answer]:
        tail = self.tail(self.prompt(rows[0])) if self.follows_a_word(request) else []
        decode = self.decoding(request)
        continuation = Continuation(decode, tail)
        if not continuation.before and request.clean_up:
            return None
        ids = outputs[0]["tokens"].tolist()
        written = continuation.of(ids, decode(ids))
        details = self._continued(answer.details or {}, tail)
        return replace(answer, value=self.value(request, written, details), details=details)

    def _continued(self, details: Details, tail: Sequence[int]) -> Details:
        """Return details in which the first token's text, and those of the others at its position, continue the prompt's."""
        tokens, tops = details.get("tokens"), details.get("top_tokens")
        if not tokens:
            return details
        continuation = Continuation(partial(self.tokenizer.decode, skip_special_tokens=False, raw=True), tail)

        def continued(token: Details) -> Details:
            return {**token, "text": continuation.of([token["id"]], token["text"])}

        found = {**details, "tokens": [continued(tokens[0]), *tokens[1:]]}
        return {**found, "top_tokens": [list(map(continued, tops[0])), *tops[1:]]} if tops else found

    def _whole(self, request: Request, written: str) -> Json:
        """Return the generated text, after the prompt or chat if that is returned too."""
        if not self.parameter(request, "return_full_text"):
            return written
        if "text" in request.inputs:
            return str(request.inputs["text"]) + written
        *earlier, last = request.inputs["messages"]
        if last["role"] == "assistant":
            return [*earlier, {"role": last["role"], "content": last["content"] + written}]
        return [*earlier, last, {"role": "assistant", "content": written}]

    def check_parameters(self, request: Request) -> None:
        super().check_parameters(request)
        if request.parameters.get("long_inputs") == "reject" and "truncate" in request.parameters:
            raise InvalidRequest(
                'a prompt is either truncated or rejected; send "truncate" or "long_inputs": "reject"',
                "parameters.truncate",
            )

    def _wanted(self, request: Request) -> int:
        """Return for how many new tokens the prompt leaves room: those that are asked for. Else a truncated prompt leaves room
        for a text, unless it is known how much of it is read; any other one is continued as far as possible."""
        wanted: Optional[int] = request.parameters.get("max_new_tokens")
        if wanted is not None:
            return wanted
        longest = self.manifest.max_length
        if self.long_inputs(request) != "truncate" or (self._most_read(request) or longest) < longest:
            return 1
        return min(self.parameter(request, "max_new_tokens") or 256, longest // 2)

    def _most_read(self, request: Request) -> Optional[int]:
        """Return how many tokens of the prompt are read at most; None: all. A request that has long prompts rejected has not
        the archive's own limit."""
        if request.parameters.get("long_inputs") == "reject":
            return None
        most: Optional[int] = self.parameter(request, "truncate")
        return most

    def long_inputs(self, request: Request) -> str:
        return super().long_inputs(request) if self._most_read(request) is None else "truncate"

    def from_texts(self, texts: Sequence[str]) -> List[Request]:
        """Use each text as a prompt; truncate the long ones."""
        most = that_fit(NEW_TOKENS_OF_SAMPLE, self.manifest)
        parameters = {**self.gate_parameters, "max_new_tokens": most, "long_inputs": "truncate"}
        return [Request({"text": text}, parameters) for text in texts if text]

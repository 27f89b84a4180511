"""Calls of real clients, each compared with the native answer. Run by `run.py`, in the clients' environment.

    python calls.py http://127.0.0.1:PORT

prints a JSON line per call: client, version, archive, call, result ("ok", "refused", or the failure).
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import urllib.request
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

TEXT = "The parcel arrived, but the box was open and a cup is missing."
OTHER = "Bread is baked every morning before the market opens."
QUESTION, CONTEXT = (
    "When does the train leave?",
    "The train to the coast leaves at a quarter past nine from platform four.",
)
LABELS = ["delivery", "damage", "praise"]
PROMPT = "Once upon a time there was a little"
CHAT = [{"role": "user", "content": "Tell me about the sea."}]
NEXT = {"role": "user", "content": "Go on."}


class Call(NamedTuple):
    """A call of a client's method; `refused` is a part of the expected error."""

    archive: str
    name: str
    act: Callable[[], Any]
    wanted: Callable[[], Any] = lambda: None
    refused: Optional[str] = None


class Native:
    """Our own protocol, the oracle for all others."""

    def __init__(self, url: str) -> None:
        self.url = url

    def base(self, archive: str) -> str:
        return f"{self.url}/predictions/{archive}/1.0"

    def __call__(self, archive: str, inputs: Any, **parameters: Any) -> Any:
        body = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.base(archive), body, headers), timeout=60) as answer:
            return json.load(answer)


def hugging_face(native: Native) -> Iterator[Call]:
    """Call all of InferenceClient's text methods."""
    from huggingface_hub import InferenceClient

    @lru_cache(maxsize=None)  # a freed one closes its streams
    def client(archive: str) -> Any:
        return InferenceClient(model=native.base(archive))

    def plain(items: Any, *keys: str) -> Any:
        return [{key: item[key] for key in keys} for item in items]

    name = "sequence_classification"
    yield Call(
        name,
        "text_classification",
        lambda: plain(client("sequence_classification").text_classification(TEXT), "label", "score"),
        lambda: native("sequence_classification", TEXT, top_k=None),
    )
    yield Call(
        name,
        "text_classification(top_k, function_to_apply)",
        lambda: plain(
            client("sequence_classification").text_classification(TEXT, top_k=1, function_to_apply="sigmoid"),
            "label",
            "score",
        ),
        lambda: native("sequence_classification", TEXT, top_k=1, function_to_apply="sigmoid"),
    )
    name = "token_classification"
    entities = ("entity", "score", "word", "start", "end")
    yield Call(
        name,
        "token_classification",
        lambda: plain(client("token_classification").token_classification(TEXT), *entities),
        lambda: plain(native("token_classification", TEXT), *entities),
    )
    groups = ("entity_group", "score", "word", "start", "end")
    yield Call(
        name,
        "token_classification(aggregation_strategy, ignore_labels, stride)",
        lambda: plain(
            client("token_classification").token_classification(
                TEXT, aggregation_strategy="first", ignore_labels=["LABEL_9"], stride=4
            ),
            *groups,
        ),
        lambda: plain(
            native("token_classification", TEXT, aggregation_strategy="first", ignore_labels=["LABEL_9"]), *groups
        ),
    )
    asked = {"question": QUESTION, "context": CONTEXT}
    answer = ("answer", "start", "end", "score")
    yield Call(
        "question_answering",
        "question_answering",
        lambda: plain([client("question_answering").question_answering(**asked)], *answer),
        lambda: plain([native("question_answering", asked)], *answer),
    )
    options = {"top_k": 2, "doc_stride": 8, "max_answer_len": 5, "max_seq_len": 40, "handle_impossible_answer": True}
    yield Call(
        "question_answering",
        "question_answering(top_k, doc_stride, ..., max_question_len)",
        lambda: plain(
            client("question_answering").question_answering(**asked, **options, max_question_len=30), *answer
        ),
        lambda: plain(native("question_answering", asked, **options), *answer),
    )
    masked = "The train [MASK] at nine."
    filled = ("score", "token", "token_str", "sequence")
    yield Call(
        "fill_mask",
        "fill_mask(top_k)",
        lambda: plain(client("fill_mask").fill_mask(masked, top_k=3), *filled),
        lambda: plain(native("fill_mask", masked, top_k=3), *filled),
    )
    yield Call(
        "feature_extraction",
        "feature_extraction(normalize)",
        lambda: client("feature_extraction").feature_extraction(TEXT, normalize=True).tolist(),
        lambda: native("feature_extraction", TEXT, pooling="mean", normalize=True),
    )
    yield Call(
        "feature_extraction",
        "feature_extraction(truncate, prompt_name)",
        lambda: client("feature_extraction").feature_extraction(TEXT, truncate=True, prompt_name="none there"),
        refused="no prompt",
    )
    yield Call(
        "feature_extraction",
        "sentence_similarity",
        lambda: client("feature_extraction").sentence_similarity(TEXT, [OTHER, TEXT]),
        lambda: [cosine(native, TEXT, OTHER), 1.0],
    )
    yield Call(
        "zero_shot_classification",
        "zero_shot_classification(multi_label, hypothesis_template)",
        lambda: plain(
            client("zero_shot_classification").zero_shot_classification(
                TEXT, LABELS, multi_label=True, hypothesis_template="It is about {}."
            ),
            "label",
            "score",
        ),
        lambda: labelled(
            native(
                "zero_shot_classification",
                TEXT,
                candidate_labels=LABELS,
                multi_label=True,
                hypothesis_template="It is about {}.",
            )
        ),
    )
    name = "text_generation"

    def written(**parameters: Any) -> str:
        return str(native("text_generation", PROMPT, return_full_text=False, **parameters)[0]["generated_text"])

    def write(prompt: str = PROMPT, **options: Any) -> Any:
        return client("text_generation").text_generation(prompt, **options)

    yield Call(name, "text_generation", lambda: write(max_new_tokens=8), lambda: written(max_new_tokens=8))
    yield Call(
        name,
        "text_generation(details)",
        lambda: told(write(max_new_tokens=6, details=True, top_n_tokens=2)),
        lambda: details(native("text_generation", PROMPT, return_full_text=False, max_new_tokens=6, details=True)),
    )
    yield Call(
        name,
        "text_generation(stream)",
        lambda: "".join(write(max_new_tokens=8, stream=True)),
        lambda: written(max_new_tokens=8),
    )
    yield Call(
        name,
        "text_generation(stream, details)",
        lambda: streamed(list(write(max_new_tokens=8, stream=True, details=True))),
        lambda: [written(max_new_tokens=8)] * 2 + [8, 8],
    )
    drawn = {
        "do_sample": True,
        "seed": 3,
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.9,
        "typical_p": 0.9,
        "max_new_tokens": 8,
    }
    yield Call(
        name,
        "text_generation(seed, temperature, top_k, top_p, typical_p, stop, ...)",
        lambda: write(**drawn, repetition_penalty=1.1, stop=["zzz"]),
        lambda: written(**drawn, repetition_penalty=1.1, stop=["zzz"]),
    )
    yield Call(
        name,
        "text_generation(truncate)",
        lambda: write(max_new_tokens=8, truncate=4),
        lambda: written(max_new_tokens=8, truncate=4),
    )
    yield Call(name, "text_generation(watermark)", lambda: write(watermark=True), refused="watermark")
    yield Call(
        name, "text_generation(grammar)", lambda: write(grammar={"type": "regex", "value": "a"}), refused="grammar"
    )

    def chat(messages: Any = CHAT, **options: Any) -> Any:
        return client("text_generation").chat_completion(messages, max_tokens=8, **options)

    yield Call(name, "chat_completion", lambda: chat().choices[0].message.content, lambda: said(native))
    yield Call(
        name,
        "chat_completion(the next turn)",
        lambda: chat([*CHAT, chat().choices[0].message, NEXT]).choices[0].message.content,
        lambda: said(native, next_turn(native)),
    )
    yield Call(
        name,
        "chat_completion(stream)",
        lambda: "".join(chunk.choices[0].delta.content or "" for chunk in chat(stream=True)),
        lambda: said(native),
    )

    def changed() -> str:
        return str(native("text2text_generation", TEXT)["generated_text"])

    def other(method: str) -> Any:
        return getattr(client("text2text_generation"), method)(TEXT)

    yield Call("text2text_generation", "summarization", lambda: other("summarization").summary_text, changed)
    yield Call("text2text_generation", "translation", lambda: other("translation").translation_text, changed)


def open_ai(native: Native) -> Iterator[Call]:
    """Call OpenAI's clients: models, embeddings, completions, chat completions."""
    from openai import OpenAI

    def client(archive: str) -> Any:
        return OpenAI(base_url=f"{native.base(archive)}/v1", api_key="none", max_retries=0)

    name = "feature_extraction"
    both = [TEXT, OTHER]

    def vectors() -> Any:
        return native("feature_extraction", both, pooling="mean")

    def embeddings(**options: Any) -> Any:
        return client("feature_extraction").embeddings.create(model="any", **options)

    yield Call(name, "models.list", lambda: [m.id for m in client("feature_extraction").models.list()], lambda: [name])
    yield Call(
        name,
        "models.retrieve",
        lambda: client("feature_extraction").models.retrieve("feature_extraction").id,
        lambda: name,
    )
    yield Call(name, "embeddings", lambda: [d.embedding for d in embeddings(input=both).data], vectors)
    yield Call(
        name,
        "embeddings(encoding_format)",
        lambda: [d.embedding for d in embeddings(input=both, encoding_format="float").data],
        vectors,
    )
    yield Call(
        name,
        "embeddings(dimensions)",
        lambda: embeddings(input=TEXT, dimensions=4).data[0].embedding,
        lambda: vectors()[0][:4],
    )
    yield Call(name, "embeddings(token ids)", lambda: len(embeddings(input=[[5, 6, 7], [8]]).data), lambda: 2)
    yield Call(
        name,
        "embeddings of a classifier",
        lambda: client("sequence_classification").embeddings.create(model="x", input="a"),
        refused="embeddings are made by",
    )
    name = "text_generation"

    def written(**parameters: Any) -> str:
        found = native("text_generation", PROMPT, return_full_text=False, **{"max_new_tokens": 16, **parameters})
        return str(found[0]["generated_text"])

    def complete(**options: Any) -> Any:
        return client("text_generation").completions.create(model="any", **{"prompt": PROMPT, **options})

    yield Call(name, "completions", lambda: complete().choices[0].text, written)
    yield Call(
        name,
        "completions(several prompts, n, seed)",
        lambda: [c.text for c in complete(prompt=[PROMPT, OTHER], n=2, seed=5, max_tokens=6).choices][:2],
        lambda: [written(max_new_tokens=6, seed=5), written(max_new_tokens=6, seed=6)],
    )
    yield Call(
        name,
        "completions(logprobs)",
        lambda: complete(max_tokens=6, logprobs=2).choices[0].logprobs.token_logprobs,
        lambda: details(native("text_generation", PROMPT, return_full_text=False, max_new_tokens=6, details=True))[1],
    )
    yield Call(
        name,
        "completions(stream, usage)",
        lambda: with_usage(list(complete(stream=True, stream_options={"include_usage": True}))),
        lambda: [written(), 16],
    )
    yield Call(
        name,
        "completions(stop)",
        lambda: complete(stop=[written()[4:7]]).choices[0].text,
        lambda: written()[: written().index(written()[4:7])],
    )
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 1.5}
    yield Call(
        name,
        "completions(presence_penalty, frequency_penalty)",
        lambda: complete(**penalties).choices[0].text,
        lambda: written(**penalties),
    )
    bias = {"5": 2.5, "17": -100}
    yield Call(
        name,
        "completions(logit_bias)",
        lambda: complete(logit_bias=bias).choices[0].text,
        lambda: written(logit_bias=bias),
    )
    yield Call(name, "completions(best_of)", lambda: complete(best_of=3), refused="best_of")

    def chat(**options: Any) -> Any:
        return client("text_generation").chat.completions.create(
            model="any", **{"messages": CHAT, "max_tokens": 8, **options}
        )

    yield Call(name, "chat.completions", lambda: chat().choices[0].message.content, lambda: said(native))

    def turned(back: Callable[[Any], Any]) -> Any:
        messages = [*CHAT, back(chat().choices[0].message), NEXT]
        return chat(messages=messages).choices[0].message.content

    for how, back in (("", lambda message: message), (", as a dictionary", lambda message: message.model_dump())):
        yield Call(
            name,
            f"chat.completions(the next turn{how})",
            lambda back=back: turned(back),
            lambda: said(native, next_turn(native)),
        )
    yield Call(
        name,
        "chat.completions(a long chat)",
        lambda: chat(messages=CHAT * 99),
        refused="context_length_exceeded",
    )
    yield Call(
        name,
        "chat.completions(temperature, seed, n)",
        lambda: [c.message.content for c in chat(temperature=0.9, seed=4, n=2).choices],
        lambda: [said(native, temperature=0.9, seed=4), said(native, temperature=0.9, seed=5)],
    )
    yield Call(
        name,
        "chat.completions(logprobs, top_logprobs)",
        lambda: len(chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content[0].top_logprobs),
        lambda: 3,
    )
    yield Call(
        name,
        "chat.completions(stream)",
        lambda: "".join(c.choices[0].delta.content or "" for c in chat(stream=True) if c.choices),
        lambda: said(native),
    )
    yield Call(
        name,
        "chat.completions(tools)",
        lambda: chat(tools=[{"type": "function", "function": {"name": "f"}}]),
        refused="tools",
    )


def triton(native: Native) -> Iterator[Call]:
    """Call tritonclient over HTTP: binary tensors, its default."""
    import numpy as np
    from tritonclient import http

    client = http.InferenceServerClient(native.url.split("//")[1])

    def infer(archive: str, binary: bool, columns: Dict[str, List[str]], **options: Any) -> Any:
        inputs = []
        for name, texts in columns.items():
            tensor = http.InferInput(name, [len(texts)], "BYTES")
            tensor.set_data_from_numpy(np.array(texts, dtype=object), binary_data=binary)
            inputs.append(tensor)
        outputs = [http.InferRequestedOutput("answer", binary_data=binary)]
        found = client.infer(archive, inputs, outputs=outputs, request_id="7", **options)
        assert found.get_response()["id"] == "7"
        array = found.as_numpy("answer")
        return array.tolist() if array.dtype == np.float32 else [json.loads(text) for text in array]

    for binary in (True, False):
        how = "binary" if binary else "JSON"
        yield Call(
            "sequence_classification",
            f"infer, {how}",
            lambda binary=binary: infer("sequence_classification", binary, {"text": [TEXT, "Où est-ce ? 👍🏽"]}),
            lambda: native("sequence_classification", [TEXT, "Où est-ce ? 👍🏽"]),
        )
        yield Call(
            "question_answering",
            f"infer of two tensors, {how}",
            lambda binary=binary: infer("question_answering", binary, {"question": [QUESTION], "context": [CONTEXT]}),
            lambda: [native("question_answering", {"question": QUESTION, "context": CONTEXT})],
        )
        yield Call(
            "feature_extraction",
            f"infer, vectors, {how}",
            lambda binary=binary: infer("feature_extraction", binary, {"text": [TEXT]}, parameters={"pooling": "mean"}),
            lambda: native("feature_extraction", [TEXT], pooling="mean"),
        )
        yield Call(
            "sequence_classification",
            f"infer of an unknown tensor, {how}",
            lambda binary=binary: infer("sequence_classification", binary, {"text": ["a"], "txt": ["b"]}),
            refused="is no field",
        )


def cohere_client(native: Native) -> Iterator[Call]:
    """Call Cohere's rerank."""
    import cohere

    documents = [OTHER, CONTEXT]

    def ranked() -> Any:
        found = native("text_ranking", {"query": QUESTION, "documents": documents}, sort=True)
        return [[each["index"], each["score"]] for each in found]

    def rerank(**options: Any) -> Any:
        client = cohere.ClientV2("none", base_url=native.base("text_ranking"))
        found = client.rerank(model="any", query=QUESTION, documents=documents, **options)
        return [[each.index, each.relevance_score] for each in found.results]

    yield Call("text_ranking", "rerank", rerank, ranked)
    yield Call("text_ranking", "rerank(top_n)", lambda: rerank(top_n=1), lambda: ranked()[:1])


def langchain(native: Native) -> Iterator[Call]:
    """Call langchain-openai's embeddings and chat."""
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    def embed() -> Any:
        base = f"{native.base('feature_extraction')}/v1"
        own = OpenAIEmbeddings(base_url=base, api_key="none", model="any", check_embedding_ctx_length=False)
        return own.embed_documents([TEXT, OTHER])

    def chat() -> Any:
        base = f"{native.base('text_generation')}/v1"
        return ChatOpenAI(base_url=base, api_key="none", model="any", max_tokens=8).invoke(CHAT[0]["content"]).content

    yield Call(
        "feature_extraction",
        "OpenAIEmbeddings",
        embed,
        lambda: native("feature_extraction", [TEXT, OTHER], pooling="mean"),
    )
    yield Call("text_generation", "ChatOpenAI", chat, lambda: said(native))


def haystack(native: Native) -> Iterator[Call]:
    """Call Haystack's components for OpenAI's API."""
    from haystack.components.embedders import OpenAITextEmbedder
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    key = Secret.from_token("none")

    def embed() -> Any:
        own = OpenAITextEmbedder(key, model="any", api_base_url=f"{native.base('feature_extraction')}/v1")
        return own.run(TEXT)["embedding"]

    def chat() -> Any:
        base = f"{native.base('text_generation')}/v1"
        own = OpenAIChatGenerator(key, model="any", api_base_url=base, generation_kwargs={"max_tokens": 8})
        return own.run([ChatMessage.from_user(CHAT[0]["content"])])["replies"][0].text

    yield Call(
        "feature_extraction",
        "OpenAITextEmbedder",
        embed,
        lambda: native("feature_extraction", TEXT, pooling="mean"),
    )
    yield Call("text_generation", "OpenAIChatGenerator", chat, lambda: said(native))


def kserve_client(native: Native) -> Iterator[Call]:
    """Call both protocols with KServe's own client."""
    import asyncio

    import numpy as np
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    def ask(protocol: str, data: Any) -> Any:
        client = InferenceRESTClient(RESTConfig(protocol=protocol, retries=1))
        return asyncio.run(client.infer(native.url, data, model_name="sequence_classification"))

    def tensors(binary: bool) -> Any:
        tensor = InferInput("text", [2], "BYTES")
        tensor.set_data_from_numpy(np.array([TEXT, OTHER], dtype=object), binary_data=binary)
        found = ask("v2", InferRequest("sequence_classification", [tensor]))
        return [json.loads(text) for text in found.outputs[0].as_numpy().tolist()]

    def answers() -> Any:
        return native("sequence_classification", [TEXT, OTHER])

    name = "sequence_classification"
    yield Call(name, "infer, V1", lambda: ask("v1", {"instances": [TEXT, OTHER]})["predictions"], answers)
    for binary in (False, True):
        yield Call(name, f"infer, V2, {'binary' if binary else 'JSON'}", lambda binary=binary: tensors(binary), answers)
    yield Call(name, "infer, V2, of a number", lambda: ask("v1", {"instances": [3]}), refused="is not a request")


def mlserver_codecs(native: Native) -> Iterator[Call]:
    """Encode requests and decode answers with MLServer's codecs."""
    from mlserver.codecs import StringCodec
    from mlserver.types import InferenceRequest, InferenceResponse

    def ask() -> Any:
        tensor = StringCodec.encode_input("text", [TEXT, OTHER], use_bytes=False)
        body = InferenceRequest(inputs=[tensor]).model_dump_json(exclude_none=True).encode()
        url = f"{native.url}/v2/models/sequence_classification/infer"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = InferenceResponse.model_validate_json(answer.read())
        return [json.loads(text) for text in StringCodec.decode_output(found.outputs[0])]

    yield Call(
        "sequence_classification",
        "StringCodec",
        ask,
        lambda: native("sequence_classification", [TEXT, OTHER]),
    )


def said(native: Native, messages: Any = CHAT, **parameters: Any) -> str:
    """Return the model's next message in the chat."""
    options = {"max_new_tokens": 8, "return_full_text": False, **parameters}
    [found] = native("text_generation", {"messages": messages}, **options)
    return str(found["generated_text"])


def next_turn(native: Native) -> Any:
    """Return the chat with the model's message and another question."""
    return [*CHAT, {"role": "assistant", "content": said(native)}, NEXT]


def cosine(native: Native, one: str, two: str) -> float:
    vectors = native("feature_extraction", [one, two], pooling="mean", normalize=True)
    return sum(a * b for a, b in zip(*vectors))


def labelled(answer: Any) -> Any:
    return [{"label": label, "score": score} for label, score in zip(answer["labels"], answer["scores"])]


def told(found: Any) -> Any:
    tokens = found.details.tokens
    ids, logarithms = [token.id for token in tokens], [token.logprob for token in tokens]
    return [ids, logarithms, found.details.finish_reason, found.details.generated_tokens, found.generated_text]


def streamed(events: List[Any]) -> Any:
    last = events[-1]
    return ["".join(e.token.text for e in events), last.generated_text, last.details.generated_tokens, len(events)]


def with_usage(chunks: List[Any]) -> Any:
    return ["".join(c.choices[0].text for c in chunks if c.choices), chunks[-1].usage.completion_tokens]


def details(answer: Any) -> Any:
    told = answer[0]["details"]
    tokens = told["tokens"]
    ids, logarithms = [token["id"] for token in tokens], [token["logprob"] for token in tokens]
    return [ids, logarithms, told["finish_reason"], told["generated_tokens"], answer[0]["generated_text"]]


# Each client's package and its calls.
CLIENTS: Dict[str, Callable[[Native], Iterator[Call]]] = {
    "huggingface_hub": hugging_face,
    "openai": open_ai,
    "tritonclient": triton,
    "cohere": cohere_client,
    "langchain_openai": langchain,
    "haystack": haystack,
    "kserve": kserve_client,
    "mlserver": mlserver_codecs,
}


_DISTRIBUTIONS = {"haystack": "haystack-ai"}


def equal(got: Any, wanted: Any) -> bool:
    """Return whether two answers are equal, up to float32's rounding."""
    if isinstance(got, float) or isinstance(wanted, float):
        return math.isclose(got, wanted, rel_tol=1e-4, abs_tol=1e-5)
    if isinstance(got, dict):
        return isinstance(wanted, dict) and got.keys() == wanted.keys() and all(equal(got[k], wanted[k]) for k in got)
    if isinstance(got, (list, tuple)):
        return len(got) == len(wanted) and all(map(equal, got, wanted))
    return bool(got == wanted)


def result(call: Call) -> str:
    """Return the result of a call."""
    try:
        got = call.act()
    except Exception as error:  # clients raise anything
        said = f"{error} {getattr(getattr(error, 'response', None), 'text', '')}"
        if call.refused is not None and call.refused in said:
            return "refused"
        return f"{type(error).__name__}: {said[:300]}"
    if call.refused is not None:
        return f"was not refused, but answered {str(got)[:200]}"
    wanted = call.wanted()
    return "ok" if equal(got, wanted) else f"answered {str(got)[:200]}, not {str(wanted)[:200]}"


def main(url: str) -> None:
    """Call everything for which a client is installed."""
    for package, calls in CLIENTS.items():
        try:
            importlib.import_module(package)
            number = version(_DISTRIBUTIONS.get(package, package.replace("_", "-")))
        except (ImportError, PackageNotFoundError):
            continue
        for call in calls(Native(url)):
            row = {"client": f"{package} {number}", "archive": call.archive, "call": call.name, "result": result(call)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

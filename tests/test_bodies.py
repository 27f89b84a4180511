"""Bodies through every entry point: compression, charset, media type, and the parts of forms and gRPC."""

from __future__ import annotations

import base64
import bz2
import codecs
import gzip
import json
import time
import tracemalloc
import zlib
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping, Type

import pytest
from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError, UnsupportedMedia
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body
from traceserve_runtime.protocols.kserve import Instances
from traceserve_runtime.protocols.native import Plain
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.tasks.contract import Request, Task
from traceserve_runtime.tasks.question_answering import QuestionAnswering
from traceserve_runtime.tasks.sequence_classification import SequenceClassification
from traceserve_runtime.tasks.text_ranking import TextRanking

TEXT = "Où est la gare?"
MULTIPART = "multipart/form-data; boundary=x"
GRPC = Headers(grpc=True)


def read(row: Mapping[str, Any], headers: Headers = Headers(), task: Type[Task] = SequenceClassification) -> Body:
    return parse_requests(row, headers, task, 0, 10)


def texts(body: Body) -> List[Any]:
    return [request.inputs["text"] for request in body.requests]


def refusal(row: Mapping[str, Any], headers: Headers = Headers(), task: Type[Task] = SequenceClassification) -> Any:
    with pytest.raises(TraceserveError) as caught:
        read(row, headers, task)
    assert 400 <= caught.value.status < 500
    return caught.value


SENTENCE = "Bloomberg has decided."


@pytest.mark.parametrize(
    "body",
    [
        '{"text":"Bloomberg has decided.", "target":(1,2)} ',
        '{"text": "Bloomberg has decided." , "target" : ( 0, 12 ) }\n',
        '{"data": "Bloomberg has decided.", "target": (1,)}',
        '{"text":"Bloomberg has decided.", "target":1}',
        '{\t\n "data": "Bloomberg has decided.",\n  "target":0\n}\n',
        "Bloomberg has decided.",
    ],
)
def test_requests_of_the_pytorch_serve_example(body: str) -> None:
    """Its sample files are sent by `curl -T`, without a content type; one contains a Python tuple."""
    assert texts(read({"body": bytearray(body.encode())})) == [SENTENCE]


@pytest.mark.parametrize(
    "body",
    [
        '{"text": "a, \\"target\\":(1,2)}',
        '{"text": "a", "target":(1,2), "b": 1}',
        '{"text": "a", "target":(x)}',
        '{"text": "a, "target":(1,2)}',
        "{'text': 'a', 'target': (1, 2)}",
    ],
)
def test_what_else_is_no_json_is_refused(body: str) -> None:
    assert "is not valid JSON" in refusal({"body": bytearray(body.encode())}).message


# A whole JSON body, its requests, and whether the answer is a list.
WHOLE = [
    ({"text": TEXT}, [TEXT], Plain(False)),
    ({"inputs": TEXT}, [TEXT], Plain(False)),
    ({"inputs": [TEXT, "b"]}, [TEXT, "b"], Plain(True)),
    ({"data": {"text": TEXT}}, [TEXT], Plain(False)),
    ([TEXT, {"text": "b"}], [TEXT, "b"], Plain(True)),
    ({"instances": [TEXT, "b"]}, [TEXT, "b"], Instances()),
    (TEXT, [TEXT], Plain(False)),
]


@pytest.mark.parametrize("part", ["data", "inputs", "body"])
@pytest.mark.parametrize("media", ["", "application/octet-stream", "application/json"])
@pytest.mark.parametrize("value, wanted, protocol", WHOLE)
def test_json_in_a_part_is_the_body(value: Any, wanted: List[str], protocol: Any, media: str, part: str) -> None:
    """The same for a form's field, a file upload and gRPC's input; TorchServe parses parts that declare JSON."""
    source = json.dumps(value).encode()
    for headers in (Headers(MULTIPART, parts={part: media}), GRPC._replace(parts={part: media})):
        for sent in (
            source,
            b" \n" + source + b"\n",
            codecs.BOM_UTF8 + source,
            value if media.endswith("json") else source,
        ):
            if headers.grpc and media == "application/json":
                continue  # ModelInfer's, which has its own tests
            body = read({part: sent}, headers)
            assert texts(body) == wanted and body.protocol == protocol
            assert texts(read({part: sent, "target": b"0"}, headers)) == wanted


def test_a_part_with_parameters_beside_it() -> None:
    for part in ("data", "inputs", "body"):
        row = {part: b'{"text": "a"}', "parameters": b'{"top_k": 2}'}
        for headers in (Headers(MULTIPART), GRPC):
            assert read(row, headers).requests == [Request({"text": "a"}, {"top_k": 2}, 0)]


@pytest.mark.parametrize("text", ["[sic] this is a text", '"Well", he said', "12", "null", "Fish {and} chips"])
def test_a_text_in_a_part_stays_one(text: str) -> None:
    for headers in (Headers(MULTIPART), GRPC):
        for part in ("data", "inputs", "text"):
            assert texts(read({part: text.encode()}, headers)) == [text]


@pytest.mark.parametrize("text", ['{"text": "no JSON here"}', '["a"]', '"quoted"'])
def test_a_declared_text_and_a_field_are_never_read_as_json(text: str) -> None:
    for row, headers in (
        ({"data": text}, Headers(MULTIPART, parts={"data": "text/plain"})),
        ({"text": text.encode()}, Headers(MULTIPART, parts={"text": "application/octet-stream"})),
        ({"text": text.encode()}, GRPC),
        ({"body": text}, Headers("text/plain")),
    ):
        assert texts(read(row, headers)) == [text]


def test_fields_of_several_parts() -> None:
    row = {"question": b"Who?", "context": b"A crow."}
    for headers in (Headers(MULTIPART), GRPC):
        assert read(row, headers, QuestionAnswering).requests[0].inputs == {"question": "Who?", "context": "A crow."}
        whole = {"data": json.dumps({"question": "Who?", "context": "A crow."}).encode()}
        assert read(whole, headers, QuestionAnswering).requests[0].inputs == {"question": "Who?", "context": "A crow."}
        ranked = {"query": b"a", "documents": b'["b", "c"]'}
        assert read(ranked, headers, TextRanking).requests[0].inputs == {"query": "a", "documents": ["b", "c"]}


def test_broken_json_in_a_part_names_it() -> None:
    for headers in (Headers(MULTIPART), GRPC):
        error = refusal({"data": b'{"text": "half'}, headers)
        assert error.field == "data" and "the data is not valid JSON" in error.message
    for row in ({"": b""}, {"a text": b""}, {'{"text": "a"}': b""}, {"colour": b"red"}):
        assert '"text_pair", "data"; send a body as input=' in refusal(row, GRPC).message
    assert refusal({}, GRPC).message.startswith("the body is empty")
    assert refusal({"body": b""}, GRPC).message.startswith("the body is empty")


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("media", ["", "application/json", "application/octet-stream"])
def test_json_behind_a_byte_order_mark(codec: str, media: str) -> None:
    mark = "\ufeff" if codec.endswith("be") else ""
    sent = (mark + json.dumps({"text": TEXT}, ensure_ascii=False)).encode(codec)
    assert texts(read({"body": sent}, Headers(media))) == [TEXT]
    assert texts(read({"data": sent}, GRPC)) == [TEXT]


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_text_behind_a_byte_order_mark(codec: str) -> None:
    for media in ("", "text/plain", "text/plain; charset=utf-8"):
        assert texts(read({"body": TEXT.encode(codec)}, Headers(media))) == [TEXT]
    assert texts(read({"body": "\ufeff" + TEXT}, Headers("text/plain"))) == [TEXT]  # TorchServe decoded it
    assert "not utf-16-le text" in refusal({"body": b"\xff\xfeabc"}, Headers("text/plain")).message


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_json_of_wide_characters_without_a_mark(codec: str) -> None:
    assert texts(read({"body": json.dumps({"text": TEXT}).encode(codec)}, Headers("application/json"))) == [TEXT]


CHARSETS: Dict[str, List[str]] = {
    "Où est la gare?": [
        "iso-8859-1",
        "ISO8859-1",
        "latin-1",
        "windows-1252",
        '"utf-8"',
        "utf-16le",
        "UTF-16BE",
        "mac-roman",
    ],
    "駅はどこですか": ["Shift_JIS", "x-sjis", "windows-31j", "euc-jp", "iso-2022-jp", "UTF-16"],
    "ﾂｱ": ["Shift_JIS"],  # valid UTF-8, but another text
    "где вокзал": ["koi8-r", "windows-1251", "iso-8859-5", "cp866"],
    "车站在哪里": ["gbk", "GB18030", "gb2312", "hz"],
    "역이 어디예요": ["euc-kr", "ks_c_5601-1987"],
    "plain": ["us-ascii", "big5", "ascii"],
}


@pytest.mark.parametrize("text, charset", [(text, charset) for text, names in CHARSETS.items() for charset in names])
def test_a_declared_charset(text: str, charset: str) -> None:
    python = {"x-sjis": "shift_jis", "windows-31j": "cp932", '"utf-8"': "utf-8"}.get(charset, charset)
    sent = text.encode(python)
    content_type = f"Text/Plain; format=flowed; Charset={charset}"
    assert texts(read({"body": sent}, Headers(content_type, parts={"body": "text/plain"}))) == [text]
    try:  # if the bytes happen to be UTF-8, TorchServe passes another text
        other = sent.decode("utf-8")
    except UnicodeDecodeError:
        return
    assert texts(read({"body": other}, Headers(content_type))) == [text]


def test_json_is_utf_8_where_it_can_be() -> None:
    """TorchServe parses such JSON before the charset is seen; so every entry point does, for equal answers."""
    for content_type in ("application/json; charset=iso-8859-1", "application/json"):
        assert texts(
            read({"body": json.dumps({"text": TEXT}, ensure_ascii=False).encode()}, Headers(content_type))
        ) == [TEXT]
    for charset in ("iso-8859-1", "utf-16"):
        sent = json.dumps({"text": TEXT}, ensure_ascii=False).encode(charset)
        assert texts(read({"body": sent}, Headers(f"application/json; charset={charset}"))) == [TEXT]


@pytest.mark.parametrize(
    "charset",
    ["klingon", "zlib", "bz2", "rot13", "base64", "hex", "idna", "punycode", "unicode_escape", "undefined", "utf-7", "x" * 500,
     "é", "cp99999", "../../x", "os"],
)  # fmt: skip
def test_an_unknown_charset_is_refused_by_its_name(charset: str) -> None:
    for media in ("text/plain", "application/json", "application/octet-stream"):
        error = refusal({"body": b"\xffabc"}, Headers(f"{media}; charset={charset}"))
        assert type(error) is UnsupportedMedia and error.status == 415
        assert f'charset "{charset[:40]}' in error.message and "UTF-8" in error.message


def test_text_that_is_not_of_its_charset() -> None:
    error = refusal({"body": b"ab\x82"}, Headers("text/plain; charset=shift_jis"))
    assert type(error) is InvalidRequest and "not shift-jis text at byte 2" in error.message
    error = refusal({"body": b"caf\xe9"}, Headers("text/plain"))
    assert "not UTF-8 text at byte 3" in error.message and "charset=iso-8859-1" in error.message


def test_a_part_has_its_own_charset_or_the_forms() -> None:
    row = {"text": "駅はどこですか".encode("iso-2022-jp"), "text_pair": TEXT.encode("iso-8859-1")}
    parts = {"text": "text/plain; charset=ISO-2022-JP"}
    body = read(row, Headers(f"{MULTIPART}; charset=iso-8859-1", parts=parts))
    assert body.requests[0].inputs == {"text": "駅はどこですか", "text_pair": TEXT}
    for name in ("data", "body", "inputs"):
        parts = {name: 'text/plain; charset="iso-2022-jp"'}
        assert texts(read({name: row["text"]}, Headers(MULTIPART, parts=parts))) == ["駅はどこですか"]
    error = refusal(row, Headers(MULTIPART, parts={"text": "text/plain; charset=klingon"}))
    assert type(error) is UnsupportedMedia and '"klingon"' in error.message


def test_a_form_of_another_charset_is_refused_by_its_name() -> None:
    error = refusal({"text": b"a"}, Headers("application/x-www-form-urlencoded; charset=Shift_JIS", 6))
    assert error.status == 415 and '"shift_jis"' in error.message


@pytest.mark.parametrize(
    "media", ["multipart/mixed; boundary=x", "Multipart/Related; boundary=x", "multipart/form-data"]
)
def test_other_multipart_bodies_are_refused(media: str) -> None:
    """TorchServe's frontend, and servers of our own, hand them over unparsed."""
    source = b"--x\r\nContent-Type: text/plain\r\n\r\nWhere is my parcel?\r\n--x--\r\n"
    for row, headers in (
        ({"body": source}, Headers(media, len(source), parts={"body": media})),
        ({"data": source}, Headers(MULTIPART, parts={"data": media})),
        ({"data": source}, GRPC._replace(parts={"data": media})),
    ):
        error = refusal(row, headers)
        assert type(error) is UnsupportedMedia and "only multipart/form-data with its boundary" in error.message
        assert media.lower().partition(";")[0] in error.message


CSV = [
    ("inputs\nWhere is my parcel?\nI lost my card.", [{"text": "Where is my parcel?"}, {"text": "I lost my card."}]),
    ("text\r\none\r\n\r\ntwo\r\n", [{"text": "one"}, {"text": "two"}]),
    ('text\n"a, ""b""\nc"\n', [{"text": 'a, "b"\nc'}]),
    ("text,text_pair\na,b\nc,\n", [{"text": "a", "text_pair": "b"}, {"text": "c"}]),
    (" text_pair , text \nb,a", [{"text": "a", "text_pair": "b"}]),
    ('text\n""', [{"text": ""}]),
    ("\n\ntext\na", [{"text": "a"}]),
]


@pytest.mark.parametrize("source, wanted", CSV)
def test_csv_is_a_list_of_requests(source: str, wanted: List[Any]) -> None:
    for row in ({"body": source}, {"body": source.encode()}, {"body": codecs.BOM_UTF8 + source.encode()}):
        body = read(row, Headers("text/csv; charset=utf-8"))
        assert [request.inputs for request in body.requests] == wanted and body.protocol == Plain(True)
    upload = read({"data": source}, Headers(MULTIPART, parts={"data": "text/csv"}))
    assert [request.inputs for request in upload.requests] == wanted and upload.protocol == Plain(True)
    if "," not in source:
        assert [r.inputs for r in read({"body": source}, Headers("text/tab-separated-values")).requests] == wanted


def test_csv_has_every_kind_of_field() -> None:
    row = {"body": 'query,documents,parameters\nq,"[""a"", ""b""]","{""top_k"": 1}"\n'}
    [request] = read(row, Headers("text/csv"), TextRanking).requests
    assert request.inputs == {"query": "q", "documents": ["a", "b"]} and request.parameters == {"top_k": 1}
    long = "word " * 100_000
    assert texts(read({"body": f"text\n{long}"}, Headers("text/csv"))) == [long]


@pytest.mark.parametrize(
    "source, words",
    [
        ("review\ngood\nbad", '"review" is none; "text", "text_pair"'),
        ("Where is my parcel?\nI lost my card.", "is a header with the names of fields"),
        ("text,label\na,1\n", '"label" is none'),
        ("txet\na\n", 'did you mean "text"'),
        ("text,text\na,b\n", "a name stands there twice"),
        ("text\nHello, world\n", "line 2 has 2 columns, but the header 1"),
        ("text,text_pair\na\n", "line 2 has 1 columns, but the header 2"),
        ('text\n"half', "is not valid CSV"),
        ("text\n", "the list is empty"),
        ("text_pair\nb\n", '"text" is missing'),
    ],
)
def test_csv_that_is_refused(source: str, words: str) -> None:
    error = refusal({"body": source}, Headers("text/csv"))
    assert type(error) is InvalidRequest and words in error.message


@pytest.mark.parametrize("text", ["Where is my parcel?", "Hello, world", '"Well", he said', '{"text": "no JSON here"}'])
def test_one_line_of_csv_without_a_header_is_a_text(text: str) -> None:
    assert texts(read({"body": text}, Headers("text/csv"))) == [text]


@pytest.mark.parametrize(
    "source, text",
    [
        ('"Where is my card, please?"\n', "Where is my card, please?"),
        ('"Where is my ""card"", please?"', 'Where is my "card", please?'),
        ('\r\n"two\nlines, and a comma"\r\n\r\n', "two\nlines, and a comma"),
        ('" a "', " a "),
        ('"half', '"half'),  # no cell: as it was sent
        ('"a" b', '"a" b'),
        ('"a","b"', '"a","b"'),
        (' "a"', ' "a"'),
    ],
)
def test_a_single_quoted_cell_of_csv_is_a_text_without_its_quotes(source: str, text: str) -> None:
    for media in ("text/csv", "text/tab-separated-values"):
        assert texts(read({"body": source}, Headers(media))) == [text]


def test_quoted_cells_of_csv_on_several_lines_need_a_header() -> None:
    assert "is a header" in refusal({"body": '"one"\n"two"\n'}, Headers("text/csv")).message
    assert "not valid CSV" in refusal({"body": '"one"\n"two'}, Headers("text/csv")).message


@pytest.mark.parametrize("media", ["application/jsonlines", "application/x-ndjson", "application/jsonl", "text/jsonl"])
def test_json_lines_are_a_list(media: str) -> None:
    source = '{"text": "a"}\r\n\n"b"\n{"inputs": "c", "parameters": {"top_k": 2}}\n'
    for value in (source, source.encode()):
        body = read({"body": value}, Headers(media))
        assert texts(body) == ["a", "b", "c"] and body.protocol == Plain(True)
        assert body.requests[2].parameters == {"top_k": 2}
    assert read({"body": b'"a"'}, Headers(media)).protocol == Plain(True)
    error = refusal({"body": b'"a"\n{"text": \n'}, Headers(media))
    assert "line 2 of the body is not valid JSON" in error.message
    assert refusal({"body": b'"a"\n{"txt": "b"}'}, Headers(media)).field == "[1].txt"


@pytest.mark.parametrize(
    "media, head, line, most",
    [
        ("application/jsonlines", "", '"a"\n', 4096),
        ("application/jsonlines", "", "\n \n" + '"a"\n', 4096),
        ("text/csv", "inputs\n", "a\n", 4096),
        ("text/csv", "text\n", '"a\n\n\n"\n', 4096),
    ],
)
def test_lines_are_parsed_only_as_far_as_any_list_may_be_long(media: str, head: str, line: str, most: int) -> None:
    """Blank lines and those within a cell are not counted."""
    error = refusal({"body": head + line * most}, Headers(media))
    assert type(error) is InputTooLong and "4,096 texts; one request may have 10" in error.message
    began = time.process_time()
    error = refusal({"body": head + line * (1 << 16)}, Headers(media))
    assert type(error) is InputTooLong and "more than 4,096 lines; one request may have 10" in error.message
    error = refusal({"body": head + line * most + "\n" * (16 << 20)}, Headers(media))
    assert type(error) is InputTooLong and "line breaks; one request may have 524,288" in error.message
    assert time.process_time() - began < 0.5


def test_as_many_lines_are_parsed_as_the_model_has_rows() -> None:
    lines = '"a"\n' * 5000
    assert len(parse_requests({"body": lines}, Headers("text/jsonl"), SequenceClassification, 0, 5000).requests) == 5000


@pytest.mark.parametrize(
    "media", ["text/json", "text/x-json; charset=utf-8", "application/ld+json", "application/x-json"]
)
def test_every_json_is_json(media: str) -> None:
    for value in ('{"text": "a"}', b'{"text": "a"}') if media.startswith("text") else (b'{"text": "a"}',):
        assert texts(read({"body": value}, Headers(media, parts={"body": media.split(";")[0]}))) == ["a"]


def compressed(name: str, data: bytes) -> bytes:
    raw = zlib.compressobj(wbits=-15)
    return {
        "gzip": gzip.compress(data),
        "x-gzip": gzip.compress(data[:3]) + gzip.compress(data[3:]) + b"\0\0",
        "GZIP": gzip.compress(data),
        "deflate": zlib.compress(data),
        "identity, deflate": raw.compress(data) + raw.flush(),
        "identity": data,
    }[name]


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "deflate", "identity, deflate", "identity"])
def test_compressed_bodies(encoding: str) -> None:
    for media, source in (
        ("application/json", json.dumps({"text": TEXT}).encode()),
        ("", json.dumps({"text": TEXT}).encode()),
        ("text/plain; charset=iso-8859-1", TEXT.encode("iso-8859-1")),
        ("text/csv", f"text\n{TEXT}".encode()),
    ):
        body = read({"body": compressed(encoding, source)}, Headers(media, content_encoding=encoding))
        assert texts(body) == [TEXT]


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, br", "gzip, gzip", "nonsense", "x" * 300])
def test_an_unknown_content_encoding_is_refused_by_its_name(encoding: str) -> None:
    error = refusal({"body": b"\x1f\x8b\x08"}, Headers("application/json", content_encoding=encoding))
    assert type(error) is UnsupportedMedia and f'"{encoding[:40]}' in error.message and "gzip, deflate" in error.message


@pytest.mark.parametrize(
    "encoding, body",
    [
        ("gzip", b"no gzip"),
        ("gzip", gzip.compress(b'"a"', mtime=0)[:-4]),
        ("gzip", gzip.compress(b'"a"', mtime=0) + b"more"),
        ("gzip", gzip.compress(b"", mtime=0) * 1000),
        ("deflate", zlib.compress(b'"a"') + b"more"),
        ("deflate", bz2.compress(b'"a"')),
        ("gzip", {"text": "parsed"}),
        ("gzip", "plain"),
        ("gzip", b""),
    ],
)
def test_what_is_not_compressed_as_it_says(encoding: str, body: Any) -> None:
    error = refusal({"body": body}, Headers("application/json", content_encoding=encoding))
    assert type(error) is InvalidRequest and error.message.isprintable()


def test_what_unpacks_to_too_much_is_refused_early() -> None:
    bomb = gzip.compress(b" " * (300 << 20))  # 300 kB
    tracemalloc.start()
    started = time.perf_counter()
    error = refusal({"body": bomb}, Headers("application/json", content_encoding="gzip"))
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert type(error) is InputTooLong and error.status == 413 and "decompressed" in error.message
    assert peak < 64 << 20 and seconds < 5


def test_a_compressed_body_without_its_header_is_told_so() -> None:
    assert "Content-Encoding: gzip" in refusal({"body": gzip.compress(b'"a"')}, Headers("application/json")).message


def test_a_large_form_is_compared_with_its_length_at_once() -> None:
    """Byte by byte it took a second, in which a worker answered nobody."""
    text = "Où est la gare? " * (1 << 18)
    length = len("text=") + len(text) + text.count("ù") + 2 * (2 * text.count("ù") + text.count("?"))
    began = time.process_time()
    body = read({"text": text}, Headers("application/x-www-form-urlencoded", length))
    assert texts(body) == [text] and time.process_time() - began < 0.4
    with pytest.raises(InvalidRequest, match="only a part arrived"):
        read({"text": text}, Headers("application/x-www-form-urlencoded", length + 3))


def test_a_compressed_form_is_refused() -> None:
    assert refusal({"text": b"a"}, Headers(MULTIPART, content_encoding="gzip")).status == 415


INFER = Headers(parts={"body": "application/json"}, grpc=True)


def infer(data: List[bytes], **tensor: Any) -> Dict[str, Any]:
    """Return TorchServe's conversion of a ModelInfer call."""
    encoded = [base64.b64encode(item).decode() for item in data]
    own = {"name": "text", "shape": [len(data)], "datatype": "BYTES", "data": encoded, **tensor}
    return {"id": "7", "model_name": "m", "inputs": [own]}


def test_texts_of_model_infer_are_in_base64() -> None:
    body = read({"body": infer([TEXT.encode(), b"b"])}, INFER)
    assert texts(body) == [TEXT, "b"]
    named = {"datatype": "BYTES", "shape": [1], "data": [{"label": "x"}]}
    model: Any = SimpleNamespace(name="m", version="1")
    answer = body.protocol.document([{"label": "x"}], model)
    assert answer == {"model_name": "m", "model_version": "1", "id": "7", "outputs": [{"name": "output", **named}]}
    error = refusal({"body": infer([b"\xff"])}, INFER)
    assert error.field == "inputs[0].data[0]" and "not UTF-8 text at byte 0" in error.message
    assert "raw_input_contents" in refusal({"body": infer([], shape=[1])}, INFER).message
    plain = infer([])
    plain["inputs"][0].update(data=["YWJj"], shape=[1])
    assert texts(read({"body": plain}, Headers("application/json"))) == ["YWJj"]  # over REST

"""Turns a body, however it arrived, into text or parsed JSON. This is decided only here.

The frontend hands over one body, or the named parts of a form, a file upload or a gRPC call (`input={"data": ...}`).
Bytes are

1. decompressed by `Content-Encoding` (gzip or deflate; others are refused by name),
2. decoded by their byte-order mark (UTF-8, UTF-16, UTF-32), else by the declared charset, else as UTF-8 (JSON that is
   valid UTF-8 is read as UTF-8 whatever is declared, as in TorchServe itself),
3. parsed by their media type: any name with "json" in it is JSON; jsonlines and ndjson are a list, one JSON value per
   line; text/csv and text/tab-separated-values are a list, one request per line below a header of field names (a single
   line that is not a header is a text, and so is a single quoted cell, without its quotes); any other text/* is a text,
   even if it looks like JSON; with an unknown type (none, application/octet-stream, ...), a body that begins with {, [
   or " is JSON, and any other is a text.

The parts `data`, `inputs` and `body` each hold a whole body, parsed by the same rules with the part's own media type; a
part that comes alone is the body. A part named like a field of the task holds that field's text, or its JSON if the
field is a list. A form whose only key has no value is a text. (`curl -d TEXT` makes such forms. TorchServe's frontend
forwards only the text before an = or &; what arrives of such a form is refused. See `_is_whole`.)
"""

from __future__ import annotations

import csv
import io
import re
import string
from itertools import islice
from types import MappingProxyType
from typing import Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Protocol, Tuple, Type, Union

from traceserve_runtime.errors import InputTooLong, InvalidRequest, UnsupportedMedia
from traceserve_runtime.protocols import binary_tensors
from traceserve_runtime.protocols.decoding import MULTIPART, Media, codec_of, decode_text, decompress, media_of
from traceserve_runtime.protocols.wording import MOST_ITEMS, JsonBudget, listed, nearest_name, parse_json, short
from traceserve_runtime.tasks.contract import Task

# `target` names the class that the pytorch/serve example explains; its clients send it with every request.
UNUSED_FIELDS = ("target",)
_TARGET = re.compile(r',\s*"target"\s*:\s*\([\d\s,]*\)\s*\}\s*\Z')
LEGAL_BODIES = (
    'send a text as text/plain, or JSON: a string, {"text": "..."}, {"inputs": ..., "parameters": {...}}, or a list'
)
_NOT_A_FORM = (
    "send a text by curl -H 'Content-Type: text/plain' --data-binary TEXT, or JSON by curl -H 'Content-Type: "
    "application/json' -d JSON"
)
_WHOLE_BODIES = ("data", "inputs", "body")  # parts that hold a whole body
_SEPARATORS = {"text/csv": ",", "application/csv": ",", "text/tab-separated-values": "\t"}
_LINES = re.compile(r"(application|text)/(x-)?(jsonlines|jsonl|ndjson|json-lines)")
_MOST_BREAKS = 1 << 19  # of lines, blank ones and those within a cell included: a fifth of a second
_ALPHANUMERIC = (string.ascii_letters + string.digits).encode()
_MOST_DIGITS = 18  # of a length in bytes; beyond 4,300 digits int() raises


class _Lines(Protocol):
    """A reader of CSV."""

    line_num: int

    def __iter__(self) -> Iterator[List[str]]: ...


class Headers(NamedTuple):
    """The parts of a request's headers that are used, and the entry point that they indicate."""

    content_type: str = ""  # "": unknown
    content_length: Optional[int] = None
    content_encoding: str = ""
    parts: Mapping[str, str] = MappingProxyType({})  # the media type of each part that the frontend parsed
    grpc: bool = False
    explain: bool = False  # came through the explanations endpoint
    path: str = ""  # what follows the model's name and version
    client: str = ""  # the client library, by its own account
    binary: Optional[int] = None  # Open Inference: bytes of JSON before the binary tensors

    @property
    def infer(self) -> bool:
        """Whether it came through ModelInfer, the only gRPC call that TorchServe converts to JSON."""
        return self.grpc and self.parts.get("body") == "application/json"


def length_in(header: str, absurd: Optional[int] = None) -> Optional[int]:
    """Return the length in a header, None if there is none, `absurd` if it has more digits than any length has."""
    if not header.isdecimal():
        return None
    return int(header) if len(header) <= _MOST_DIGITS else absurd


def read_body(row: Mapping[str, object], headers: Headers, task: Type[Task], most: int) -> object:
    """Return the text or parsed JSON of one item of TorchServe's batch; raises a TraceserveError with a 4xx status.

    `most` limits the texts; JSON lines and CSV are parsed only as far as any list may be long.
    """
    media = media_of(headers.content_type)
    if "body" in row and not media.is_form and not headers.grpc:
        own = media_of(headers.parts.get("body", ""))
        media = own if own.name not in ("", media.name) else media
        value = row["body"]
        if headers.content_encoding:
            value = decompress(value, headers.content_encoding)
        if headers.binary is not None and isinstance(value, (bytes, bytearray)):
            return binary_tensors.read_binary(bytes(value), headers.binary, most)
        return _document(value, media, task, "body", most, JsonBudget(most))
    if headers.content_encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedMedia(f"compressed forms are not supported; {_NOT_A_FORM}")
    return _form(row, media, headers, task, most)


def _document(value: object, media: Media, task: Type[Task], part: str, most: int, budget: JsonBudget) -> object:
    """Return the text or parsed JSON of a body, or of a part that holds one; what is parsed is counted in `budget`."""
    if not isinstance(value, (bytes, bytearray, str)) or (isinstance(value, str) and media.name == "application/json"):
        return value  # TorchServe parsed it
    if media.name.startswith("multipart/"):
        raise UnsupportedMedia(
            f"{short(media.name)} is not supported, only {MULTIPART} with its boundary; {LEGAL_BODIES}"
        )
    text = decode_text(value, media, part)
    if not text:
        raise InvalidRequest(f"the body is empty; {LEGAL_BODIES}")
    if _LINES.fullmatch(media.name) or media.name in _SEPARATORS:
        breaks = text.count("\n") + text.count("\r")
        if breaks > _MOST_BREAKS:
            raise InputTooLong(
                f"the body has {breaks:,} line breaks; one request may have {_MOST_BREAKS:,}; send several"
            )
    if _LINES.fullmatch(media.name):
        lines = ((number, line) for number, line in enumerate(io.StringIO(text, newline="\n"), 1) if line.strip())
        values = (parse_json(line.rstrip("\n"), f"line {number} of the {part}", part, budget) for number, line in lines)
        return _limited(values, most)
    if media.is_json:
        return parse_json(text, part, budget=budget)
    if media.name in _SEPARATORS:
        return _table(text, _SEPARATORS[media.name], task, part, most, budget)
    if media.name.startswith("text/") or (isinstance(value, str) and not media.name):
        return text
    return _guess(text, part, budget)


def _limited(lines: Iterable[object], most: int) -> List[object]:
    """Return what is parsed of lines; raises InputTooLong, without parsing the rest, if no list may be as long."""
    most_items = max(MOST_ITEMS, most)
    parsed = list(islice(lines, most_items + 1))
    if len(parsed) > most_items:
        raise InputTooLong(
            f"the body has more than {most_items:,} lines; one request may have {most:,} texts; send several"
        )
    return parsed


def _guess(text: str, part: str, budget: JsonBudget) -> object:
    """Parse JSON if it is JSON, else return the text; for a body of unknown media type."""
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return text
    try:
        return parse_json(_without_target(text), part, budget=budget)
    except InvalidRequest:
        if text.lstrip()[0] == "{":
            raise
        return text


def _without_target(text: str) -> str:
    """Drop a trailing `"target": (1, 2)` from an object.

    It is Python, not JSON; the pytorch/serve example for token classification sends it, and nobody reads it.
    """
    end = _TARGET.search(text, max(0, len(text) - 200))
    return text[: end.start()] + "}" if end else text


def _table(text: str, separator: str, task: Type[Task], part: str, most: int, budget: JsonBudget) -> object:
    """Return the requests in a CSV file whose header names fields, or only `inputs`.

    Several lines without a header are refused: column names could be answered as if they were text. A single line is
    a text, whose commas need no quotes; what quotes it as one cell, such as SageMaker's batch transform of a table, is
    undone. An empty cell of an optional field counts as not sent.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        cells = next((cells for cells in reader if cells), [])
        header = [cell.strip() for cell in cells]
        problem = _wrong_header(header, [*(field.name for field in task.fields), "parameters"])
        if not problem:
            return _limited(_rows(reader, header, task, part, budget), most)
        if len(header) == 1 and text.lstrip("\r\n").startswith('"') and not any(reader):
            return cells[0]
    except csv.Error as error:
        problem = f"line {reader.line_num} is not valid CSV: {error}"
    if len(text.strip("\r\n").splitlines()) <= 1:
        return text
    raise InvalidRequest(problem, part)


def _wrong_header(header: List[str], known: List[str]) -> str:
    """Return what is wrong with the first line of a CSV body; "" if it is a header."""
    if header in (["inputs"], ["data"]):
        return ""
    wrong = next((name for name in header if name not in known), None)
    if wrong is None and len(set(header)) == len(header):
        return ""
    problem = (
        f'"{short(wrong)}" is none{nearest_name(wrong, known)}' if wrong is not None else "a name stands there twice"
    )
    return (
        f"the first line of a CSV body is a header with the names of fields, but {problem}; "
        f'{listed(known)} are known, or "inputs" alone'
    )


def _rows(reader: _Lines, header: List[str], task: Type[Task], part: str, budget: JsonBudget) -> Iterator[object]:
    """Iterate over the requests below the header."""
    required = {field.name for field in task.fields if field.required}
    for cells in reader:
        if len(cells) not in (0, len(header)):
            raise InvalidRequest(
                f"line {reader.line_num} has {len(cells)} columns, but the header {len(header)}; put a text that "
                "contains the column separator in double quotes",
                part,
            )
        if header in (["inputs"], ["data"]):
            yield from cells
        elif cells:
            sent = {name: cell for name, cell in zip(header, cells) if cell or name in required}
            yield _typed(sent, task, budget)


def _form(row: Mapping[str, object], media: Media, headers: Headers, task: Type[Task], most: int) -> object:
    """Return the fields of a form or a gRPC call, or the text or JSON that was sent as one."""
    if not row and not headers.content_length:
        raise InvalidRequest(f"the body is empty; {LEGAL_BODIES}")
    url_encoded = media.name != MULTIPART and not headers.grpc
    if url_encoded:
        if codec_of(media.charset) not in ("", "utf_8", "ascii"):
            raise UnsupportedMedia(f'the charset "{short(media.charset)}" of a form is not supported; forms are UTF-8')
        texts = {str(key): decode_text(value, Media("", ""), str(key), marks=False) for key, value in _unparsed(row)}
        if not _is_whole(texts, headers.content_length):
            raise InvalidRequest(f"the body was sent as a form, but only a part arrived; {_NOT_A_FORM}")
    parts = {}
    for key in row:
        own = media_of(headers.parts.get(key, ""))
        parts[str(key)] = Media(own.name, "" if url_encoded else own.charset or media.charset)
    known = {*_WHOLE_BODIES, "parameters", *UNUSED_FIELDS, *(field.name for field in task.fields)}
    if known & set(parts) or len(dict(_unparsed(row))) < len(row):
        return _known_parts(row, parts, task, most)
    if headers.grpc:
        legal = listed([*(field.name for field in task.fields), "data"])
        raise InvalidRequest(f'the input has none of the keys {legal}; send a body as input={{"data": BODY}}')
    fields = {str(key): decode_text(value, parts[key], str(key)) for key, value in _unparsed(row)}
    body = "&".join(key + ("=" + value if value else "") for key, value in fields.items()).lstrip("\ufeff")
    if body.lstrip()[:1] in ("{", "[", '"'):
        return _guess(body, "body", JsonBudget(most))
    if len(fields) == 1 and not next(iter(fields.values())):
        return body
    raise InvalidRequest(f"the form has none of the fields {listed(f.name for f in task.fields)}; {_NOT_A_FORM}")


def _unparsed(row: Mapping[str, object]) -> List[Tuple[str, Union[str, bytes, bytearray]]]:
    """Return the parts that were not parsed yet; TorchServe parses those of multipart forms that declare JSON."""
    return [(key, value) for key, value in row.items() if isinstance(value, (bytes, bytearray, str))]


def _known_parts(row: Mapping[str, object], parts: Mapping[str, Media], task: Type[Task], most: int) -> object:
    """Return the body that the parts of a form make up."""
    asked = [name for name in row if name not in UNUSED_FIELDS]
    whole = [name for name in asked if name == "body" or (name in _WHOLE_BODIES and not _is_empty(row[name]))]
    budget = JsonBudget(most)
    documents = {name: _document(row[name], parts[name], task, name, most, budget) for name in whole}
    if list(documents) == asked and len(asked) == 1 and not isinstance(documents[asked[0]], str):
        return documents[asked[0]]
    others = {name: row[name] for name in row if name not in documents}
    texts = {
        name: decode_text(value, parts[name], name) for name, value in _unparsed(others) if not parts[name].is_json
    }
    parsed = {
        name: _document(value, parts[name], task, name, most, budget)
        for name, value in others.items()
        if name not in texts
    }
    fields = {**_typed(texts, task, budget), **parsed}
    if "body" in documents:  # beside other parts it means `data`
        documents = {"data" if name == "body" else name: value for name, value in documents.items()}
    return {**documents, **fields}


def _is_empty(value: object) -> bool:
    return isinstance(value, (bytes, bytearray, str)) and not value


def _typed(texts: Mapping[str, str], task: Type[Task], budget: JsonBudget) -> Dict[str, object]:
    """Parse as JSON the text fields that are lists, and parameters."""
    documents = {"parameters", *(field.name for field in task.fields if field.kind != "text")}
    return {name: parse_json(text, name, budget=budget) if name in documents else text for name, text in texts.items()}


def _is_whole(fields: Mapping[str, str], content_length: Optional[int]) -> bool:
    """Return whether the received fields account for the length of the form that was sent.

    The frontend (netty 4.1.53) drops whatever follows a form's last & if it has no =, or the whole form. Received
    fields are decoded, so the length is compared for each usual encoding; a truncated form that happens to match
    another encoding's length is not noticed.
    """
    if content_length is None:
        return True
    separators = max(0, 2 * len(fields) - 1)
    bare = sum(not value for value in fields.values())  # their = may be missing
    text = "".join(key + value for key, value in fields.items()).encode("utf-8", "surrogatepass")
    lengths = {len(text)}
    for unreserved in (b"-_.~", b"-_.*", b"-_.~!'()*"):
        escaped = len(text.translate(None, _ALPHANUMERIC + unreserved))
        lengths |= {len(text) + 2 * escaped, len(text) + 2 * (escaped - text.count(b" "))}
    return any(n + separators - bare <= content_length <= n + separators + 1 for n in lengths)

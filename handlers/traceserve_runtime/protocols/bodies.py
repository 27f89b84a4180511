"""Turns a body, however it arrived, into text or parsed JSON. This is decided only here.

The frontend hands over one body, or the named parts of a form, a file upload or a gRPC call (`input={"data": ...}`).
Bytes are

1. decompressed by `Content-Encoding` (gzip or deflate; others are refused by name),
2. decoded by their byte-order mark (UTF-8, UTF-16, UTF-32), else by the declared charset, else as UTF-8 (JSON that is
valid
   UTF-8 is read as UTF-8 whatever is declared, as in TorchServe itself),
3. parsed by their media type: any name with "json" in it is JSON; jsonlines and ndjson are a list, one JSON value per
line;
   text/csv and text/tab-separated-values are a list, one request per line below a header of field names (a single line
   that
   is not a header is a text); any other text/* is a text, even if it looks like JSON; with an unknown type (none,
   application/octet-stream, ...), a body that begins with {, [ or " is JSON, and any other is a text.

The parts `data`, `inputs` and `body` each hold a whole body, parsed by the same rules with the part's own media type; a
part
that comes alone is the body. A part named like a field of the task holds that field's text, or its JSON if the field is
a list. A form whose only key has no value is a text. (`curl -d TEXT` makes such forms. TorchServe's frontend forwards
only the
text before an = or &; what arrives of such a form is refused. See `_is_whole`.)
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import zlib
from encodings import normalize_encoding
from encodings.aliases import aliases
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type, Union

from traceserve_runtime.errors import InputTooLong, InvalidRequest, UnsupportedMedia
from traceserve_runtime.protocols import binary_tensors
from traceserve_runtime.protocols.wording import listed, nearest_name, parse_json, short
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
_URL_ENCODED = "application/x-www-form-urlencoded"
_WHOLE_BODIES = ("data", "inputs", "body")  # parts that hold a whole body
_SEPARATORS = {"text/csv": ",", "application/csv": ",", "text/tab-separated-values": "\t"}
_LINES = re.compile(r"(application|text)/(x-)?(jsonlines|jsonl|ndjson|json-lines)")
_LARGEST_DECOMPRESSED = 16 << 20  # far above any legal request, far below what a small archive can expand to
_MOST_MEMBERS = 16  # in a gzip file
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_MARKS = (  # UTF-32's begin with UTF-16's, so they come first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Python's names of its character-set codecs. Others are not charsets, are slow (idna) or decompress (zlib).
_CHARSETS = re.compile(
    r"ascii|latin_1|utf_(8|16|32)(_sig|_[lb]e)?|iso8859_\d{1,2}|cp\d{3,5}|koi8_[rtu]|mac_\w{1,12}|shift_jisx?(_?2004|0213)?"
    r"|euc_(jp|jisx0213|jis_2004|kr)|iso2022_(jp(_[123]|_ext|_2004)?|kr)|gb(k|2312|18030)|big5(hkscs)?|hz|johab|tis_620"
    r"|ptcp154|kz1048|hp_roman8"
)
_ALIASES = {**aliases, "x_sjis": "shift_jis", "windows_31j": "cp932", "windows_874": "cp874", "x_gbk": "gbk"}


class Headers(NamedTuple):
    """The parts of a request's headers that are used, and the entry point that they indicate."""

    content_type: str = ""  # "": unknown
    content_length: Optional[int] = None
    content_encoding: str = ""
    parts: Mapping[str, str] = MappingProxyType({})  # the media type of each part that the frontend parsed
    grpc: bool = False
    explain: bool = False  # came through the explanations endpoint
    ended: bool = False  # its call already failed; an answer would crash TorchServe
    path: str = ""  # what follows the model's name and version
    client: str = ""  # the client library, by its own account
    binary: Optional[int] = None  # Open Inference: bytes of JSON before the binary tensors

    @property
    def infer(self) -> bool:
        """Whether it came through ModelInfer, the only gRPC call that TorchServe converts to JSON."""
        return self.grpc and self.parts.get("body") == "application/json"


class _Media(NamedTuple):
    name: str  # lower case, without parameters
    charset: str

    @property
    def is_form(self) -> bool:
        return self.name == _URL_ENCODED or self.name.startswith("multipart/")

    @property
    def is_json(self) -> bool:
        return "json" in self.name


def read_body(row: Mapping[str, Any], headers: Headers, task: Type[Task]) -> Any:
    """Return the text or parsed JSON of one item of TorchServe's batch; raises a TraceserveError with a 4xx status."""
    media = _media(headers.content_type)
    if "body" in row and not media.is_form and not headers.grpc:
        own = _media(headers.parts.get("body", ""))
        media = own if own.name not in ("", media.name) else media
        value = row["body"]
        if headers.content_encoding:
            value = _decompress(value, headers.content_encoding)
        if headers.binary is not None and isinstance(value, (bytes, bytearray)):
            return binary_tensors.read_binary(bytes(value), headers.binary)
        return _document(value, media, task, "body")
    if headers.content_encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedMedia(f"compressed forms are not supported; {_NOT_A_FORM}")
    return _form(row, media, headers, task)


def _media(content_type: str) -> _Media:
    name, *parameters = content_type.lower().split(";")
    declared = (parameter.partition("=") for parameter in parameters)
    charsets = [value.strip().strip("\"'") for key, _, value in declared if key.strip() == "charset"]
    return _Media(name.strip(), charsets[0] if charsets else "")


def _document(value: Any, media: _Media, task: Type[Task], part: str) -> Any:
    """Return the text or parsed JSON of a body, or of a part that holds one."""
    if not isinstance(value, (bytes, bytearray, str)) or (isinstance(value, str) and media.name == "application/json"):
        return value  # TorchServe parsed it
    text = _decode(value, media, part)
    if not text:
        raise InvalidRequest(f"the body is empty; {LEGAL_BODIES}")
    if _LINES.fullmatch(media.name):
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return [parse_json(line, f"line {number} of the {part}", part) for number, line in lines]
    if media.is_json:
        return parse_json(text, part)
    if media.name in _SEPARATORS:
        return _table(text, _SEPARATORS[media.name], task, part)
    if media.name.startswith("text/") or (isinstance(value, str) and not media.name):
        return text
    return _guess(text, part)


def _guess(text: str, part: str) -> Any:
    """Parse JSON if it is JSON, else return the text; for a body of unknown media type."""
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return text
    try:
        return parse_json(_without_target(text), part)
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


def _table(text: str, separator: str, task: Type[Task], part: str) -> Any:
    """Return the requests in a CSV file whose header names fields, or only `inputs`.

    Several lines without a header are refused: column names could be answered as if they were text. An empty
    cell of an optional field counts as not sent.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [cell.strip() for cell in next((cells for cells in reader if cells), [])]
        problem = _wrong_header(header, [*(field.name for field in task.fields), "parameters"])
        if not problem:
            return _rows(reader, header, task, part)
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


def _rows(reader: Any, header: List[str], task: Type[Task], part: str) -> List[Any]:
    """Return the requests below the header."""
    required = {field.name for field in task.fields if field.required}
    requests: List[Any] = []
    for cells in reader:
        if len(cells) not in (0, len(header)):
            raise InvalidRequest(
                f"line {reader.line_num} has {len(cells)} columns, but the header {len(header)}; a text that holds the "
                "separator of columns stands in double quotes",
                part,
            )
        if header in (["inputs"], ["data"]):
            requests += cells
        elif cells:
            sent = {name: cell for name, cell in zip(header, cells) if cell or name in required}
            requests.append(_typed(sent, task))
    return requests


def _form(row: Mapping[str, Any], media: _Media, headers: Headers, task: Type[Task]) -> Any:
    """Return the fields of a form or a gRPC call, or the text or JSON that was sent as one."""
    if not row and not headers.content_length:
        raise InvalidRequest(f"the body is empty; {LEGAL_BODIES}")
    url_encoded = not media.name.startswith("multipart/") and not headers.grpc
    if url_encoded:
        if _codec(media.charset) not in ("", "utf_8", "ascii"):
            raise UnsupportedMedia(f'the charset "{short(media.charset)}" of a form is not supported; forms are UTF-8')
        texts = {str(key): _decode(value, _Media("", ""), str(key), marks=False) for key, value in _unparsed(row)}
        if not _is_whole(texts, headers.content_length):
            raise InvalidRequest(f"the body was sent as a form, but only a part arrived; {_NOT_A_FORM}")
    parts = {
        str(key): _Media(_media(headers.parts.get(key, "")).name, "" if url_encoded else media.charset) for key in row
    }
    known = {*_WHOLE_BODIES, "parameters", *UNUSED_FIELDS, *(field.name for field in task.fields)}
    if known & set(parts) or len(dict(_unparsed(row))) < len(row):
        return _known_parts(row, parts, task)
    if headers.grpc:
        legal = listed([*(field.name for field in task.fields), "data"])
        raise InvalidRequest(f'the input has none of the keys {legal}; send a body as input={{"data": BODY}}')
    fields = {str(key): _decode(value, parts[key], str(key)) for key, value in row.items()}
    body = "&".join(key + ("=" + value if value else "") for key, value in fields.items()).lstrip("\ufeff")
    if body.lstrip()[:1] in ("{", "[", '"'):
        return _guess(body, "body")
    if len(fields) == 1 and not next(iter(fields.values())):
        return body
    raise InvalidRequest(f"the form has none of the fields {listed(f.name for f in task.fields)}; {_NOT_A_FORM}")


def _unparsed(row: Mapping[str, Any]) -> List[Tuple[str, Union[str, bytes, bytearray]]]:
    """Return the parts that were not parsed yet; TorchServe parses those of multipart forms that declare JSON."""
    return [(key, value) for key, value in row.items() if isinstance(value, (bytes, bytearray, str))]


def _known_parts(row: Mapping[str, Any], parts: Mapping[str, _Media], task: Type[Task]) -> Any:
    """Return the body that the parts of a form make up."""
    asked = [name for name in row if name not in UNUSED_FIELDS]
    whole = [name for name in asked if name == "body" or (name in _WHOLE_BODIES and not _is_empty(row[name]))]
    documents = {name: _document(row[name], parts[name], task, name) for name in whole}
    if list(documents) == asked and len(asked) == 1 and not isinstance(documents[asked[0]], str):
        return documents[asked[0]]
    others = {name: row[name] for name in row if name not in documents}
    texts = {name: _decode(value, parts[name], name) for name, value in _unparsed(others) if not parts[name].is_json}
    parsed = {name: _document(value, parts[name], task, name) for name, value in others.items() if name not in texts}
    fields = {**_typed(texts, task), **parsed}
    if "body" in documents:  # beside other parts it means `data`
        documents = {"data" if name == "body" else name: value for name, value in documents.items()}
    return {**documents, **fields}


def _is_empty(value: Any) -> bool:
    return isinstance(value, (bytes, bytearray, str)) and not value


def _typed(texts: Mapping[str, str], task: Type[Task]) -> Dict[str, Any]:
    """Parse as JSON the text fields that are lists, and parameters."""
    documents = {"parameters", *(field.name for field in task.fields if field.kind != "text")}
    return {name: parse_json(text, name) if name in documents else text for name, text in texts.items()}


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
        escaped = sum(not (chr(byte).isalnum() and byte < 128) and byte not in unreserved for byte in text)
        lengths |= {len(text) + 2 * escaped, len(text) + 2 * (escaped - text.count(b" "))}
    return any(n + separators - bare <= content_length <= n + separators + 1 for n in lengths)


def _decode(value: Union[str, bytes, bytearray], media: _Media, part: str, marks: bool = True) -> str:
    """Decode bytes by their byte-order mark, their charset, or as UTF-8.

    Text that TorchServe decoded as UTF-8 is decoded again if another charset was declared. The mark is removed.
    """
    codec = _codec(media.charset)
    if isinstance(value, str):
        if codec in ("", "utf_8", "ascii"):
            return value[1:] if marks and value[:1] == "\ufeff" else value
        value = value.encode("utf-8")
    mark, named = next(((m, n) for m, n in _MARKS if marks and value.startswith(m)), (b"", ""))
    if named:
        return _decoded(value[len(mark) :], named, part)
    if media.is_json:  # UTF-8 if valid; if undeclared, its null bytes tell
        try:
            return value.decode(codec and "utf-8" or json.detect_encoding(bytes(value[:4])))
        except UnicodeDecodeError:
            if not codec:
                return _decoded(value, "utf-8", part)
    return _decoded(value, codec or "utf-8", part)


def _decoded(value: Union[bytes, bytearray], codec: str, part: str) -> str:
    try:
        return value.decode(codec)
    except UnicodeDecodeError as error:
        name = "UTF-8" if codec in ("utf-8", "utf_8") else codec.replace("_", "-")
        hint = "; a compressed body needs Content-Encoding: gzip" if value[:2] == b"\x1f\x8b" else ""
        if name == "UTF-8" and not hint:
            hint = "; another charset is declared as in Content-Type: text/plain; charset=iso-8859-1"
        raise InvalidRequest(f"the {short(part)} is not {name} text at byte {error.start}{hint}", short(part)) from None


def _codec(charset: str) -> str:
    """Return Python's name of a declared charset, "" for none; raises UnsupportedMedia if it is unknown."""
    if not charset:
        return ""
    name = normalize_encoding(charset).lower() if charset.isascii() else charset
    codec = _ALIASES.get(name, name)
    if _CHARSETS.fullmatch(codec):
        try:
            codecs.lookup(codec)
            return codec
        except LookupError:
            pass
    raise UnsupportedMedia(f'the charset "{short(charset)}" is not supported; send UTF-8')


def _decompress(value: Any, encodings: str) -> Any:
    """Undo a body's content encoding; raises UnsupportedMedia, InvalidRequest or InputTooLong."""
    names = [name for name in (part.strip().lower() for part in encodings.split(",")) if name not in ("", "identity")]
    if not names:
        return value
    if len(names) > 1 or names[0] not in _WINDOWS:
        raise UnsupportedMedia(
            f'the content encoding "{short(", ".join(names))}" is not supported; send gzip, deflate, or a plain body'
        )
    if not isinstance(value, (bytes, bytearray, str)):
        raise InvalidRequest(f"the body is not {names[0]}, but plain JSON", "body")
    data = value.encode("utf-8") if isinstance(value, str) else bytes(value)
    window = _WINDOWS[names[0]]
    if window == 15 and not _has_zlib_header(data):
        window = -15
    try:
        return _inflate(data, window, names[0])
    except zlib.error:
        raise InvalidRequest(f"the body is not {names[0]}, as Content-Encoding says", "body") from None


def _has_zlib_header(data: bytes) -> bool:
    """Return whether deflated data has the header that the standard requires; some clients omit it."""
    return len(data) > 1 and data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0


def _inflate(data: bytes, window: int, name: str) -> bytes:
    plain = bytearray()
    members = 0
    while data:
        members += 1
        stream = zlib.decompressobj(window)
        plain += stream.decompress(data, _LARGEST_DECOMPRESSED + 1 - len(plain))
        if len(plain) > _LARGEST_DECOMPRESSED:
            raise InputTooLong(
                f"the body has more than {_LARGEST_DECOMPRESSED:,} bytes when it is decompressed; send several requests"
            )
        if not stream.eof:
            raise InvalidRequest(f"the body ends before its {name} data does", "body")
        data = stream.unused_data.lstrip(b"\0") if window == 31 else stream.unused_data
        if data and (window != 31 or members == _MOST_MEMBERS):
            raise InvalidRequest(f"something follows the {name} data of the body", "body")
    return bytes(plain)

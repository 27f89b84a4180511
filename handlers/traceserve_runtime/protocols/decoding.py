"""Undoes what lies around a body's text: its content encoding and its charset."""

from __future__ import annotations

import codecs
import json
import re
import zlib
from encodings import normalize_encoding
from encodings.aliases import aliases
from typing import NamedTuple, Union

from traceserve_runtime.errors import InputTooLong, InvalidRequest, UnsupportedMedia
from traceserve_runtime.protocols.wording import short

URL_ENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"
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


class Media(NamedTuple):
    name: str  # lower case, without parameters
    charset: str

    @property
    def is_form(self) -> bool:
        return self.name in (URL_ENCODED, MULTIPART)

    @property
    def is_json(self) -> bool:
        return "json" in self.name


def media_of(content_type: str) -> Media:
    """Parse a Content-Type."""
    name, *parameters = content_type.lower().split(";")
    declared = (parameter.partition("=") for parameter in parameters)
    charsets = [value.strip().strip("\"'") for key, _, value in declared if key.strip() == "charset"]
    return Media(name.strip(), charsets[0] if charsets else "")


def decode_text(value: Union[str, bytes, bytearray], media: Media, part: str, marks: bool = True) -> str:
    """Decode bytes by their byte-order mark, their charset, or as UTF-8.

    Text that TorchServe decoded as UTF-8 is decoded again if another charset was declared. The mark is removed.
    """
    codec = codec_of(media.charset)
    if isinstance(value, str):
        if codec in ("", "utf_8", "ascii"):
            return value[1:] if marks and value[:1] == "\ufeff" else value
        value = value.encode("utf-8")
    mark, named = next(((m, n) for m, n in _MARKS if marks and value.startswith(m)), (b"", ""))
    if named:
        return _decoded(value[len(mark) :], named, part)
    if media.is_json:  # UTF-8 if valid; if undeclared, its null bytes tell
        try:
            return value.decode("utf-8" if codec else json.detect_encoding(bytes(value[:4])))
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


def codec_of(charset: str) -> str:
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


def decompress(value: object, encodings: str) -> object:
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

"""Real sentences for the gate: several scripts and languages, emoji, empty, very long; and the user's own."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, List, Mapping, Sequence, Tuple, Type

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse
from traceserve_runtime.tasks.contract import Request, Task

from traceserve.building.gate.corpus import sentences
from traceserve.errors import ConfigError

SENTENCES = (
    "",
    "Yes.",
    "No, thank you!",
    "The train to the coast leaves at a quarter past nine from platform four.",
    "I have been waiting for my parcel since Tuesday, and nobody answers the telephone.",
    "WHY WAS MY CARD CHARGED TWICE???",
    "Could you tell me whether the blue one is still available in size 42, and what it would cost to send it to Norway?",
    "In 1889 the tower was 312.27 m high; with its antennas it measures 330 m today (a gain of about 5.7 %).",
    "def area(radius): return 3.14159 * radius ** 2  # see https://example.org/circle?x=1&y=2",
    "Ich hätte gern gewusst, ob die Rechnung über 49,90 € schon bezahlt ist.",
    "Où se trouve la gare la plus proche, s'il vous plaît ? Merci d'avance !",
    "¿Podría cambiar la dirección de entrega de mi pedido, por favor?",
    "Proszę o zwrot pieniędzy za uszkodzoną książkę.",
    "Поезд на Казань отправляется в семь часов вечера.",
    "Πού είναι το πλησιέστερο φαρμακείο;",
    "هل يمكنني إلغاء الطلب من فضلك؟",
    "אני רוצה לדבר עם נציג שירות.",
    "कृपया मुझे बताइए कि मेरा पार्सल कब पहुँचेगा।",
    "请问我的包裹什么时候能到？",
    "注文した本がまだ届いていません。確認してください。",
    "주문을 취소하고 환불받고 싶습니다.",
    "ขอบคุณมากครับ สินค้ามาถึงแล้ว",
    "Love it 😍🎉 best purchase of the year!! 👍🏽👩‍👩‍👧",
    "naïve café — “quoted” … e\u0301 and é, ﬁ and fi, Ａ and A, \u200bzero\u200bwidth",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "   spaces\tand\nline breaks \r\n everywhere   ",
)
_PARAGRAPH = (
    "The old harbour had been quiet for years when the first boats came back. They were small and brightly painted, and "
    "the people who sailed them knew the coast better than any map. In the mornings they sold fish on the quay; in the "
    "evenings they mended nets and talked about the weather, the prices and the ones who had gone away to the city. "
)
VERY_LONG = _PARAGRAPH * 12
TEXTS = (*SENTENCES, _PARAGRAPH, VERY_LONG)


_CALIBRATION = 64


def calibration(own: Sequence[Request]) -> List[str]:
    """Texts that show what a model reads: the user's own where there are some, else built-in ones of everyday length."""
    texts = [value for request in own for value in request.inputs.values() if isinstance(value, str)]
    room = _CALIBRATION - len(SENTENCES)
    return [*SENTENCES, *(texts[:: -(-len(texts) // room)] if texts else sentences(room))]


def read(path: Path, task: Type[Task]) -> List[Request]:
    """The requests of the user's samples, see `lines`; of a .jsonl file each line is a request's body."""
    requests = []
    for number, line in lines(path):
        try:
            body: Any = json.loads(line) if path.suffix == ".jsonl" else line
            row: Mapping[str, Any] = {"body": body}
            requests += parse(row, Headers(), task, 0, len(line)).requests
        except (ValueError, TraceserveError) as error:
            raise ConfigError(f"--samples {path}, line {number}: {error}") from None
    return [Request(r.inputs, {**task.gate_parameters, **r.parameters}) for r in requests]


def lines(path: Path) -> List[Tuple[int, str]]:
    """The lines of a file of samples that are not blank, or of a .csv file the cells of its column `text`, numbered."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--samples {path} cannot be read: {error}") from None
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(content, newline=""))
        columns = rows.fieldnames or ()
        if "text" not in columns:
            raise ConfigError(f"--samples {path} should have a header with a column text, not: {', '.join(columns)}")
        found = [(rows.line_num, row["text"] or "") for row in rows]
    else:  # not splitlines: JSON may hold U+2028
        found = [(number, line.rstrip("\r")) for number, line in enumerate(content.split("\n"), 1)]
    found = [(number, line) for number, line in found if line.strip()]
    if not found:
        raise ConfigError(f"--samples {path} holds no text")
    return found

"""The built-in texts: several scripts and languages, emoji, empty, very long."""

from __future__ import annotations

from typing import List, Sequence

from traceserve_runtime.tasks.contract import Request

from traceserve.building.gate.corpus import sentences

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


def calibration(own: Sequence[Request], most: int) -> List[str]:
    """Return at most this many typical texts for the model: the user's own if any, else built-in ones of everyday
    length."""
    values = [value for request in own for value in request.inputs.values()]
    texts = [
        text for value in values for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)
    ]
    room = most - len(SENTENCES)
    return [*SENTENCES, *(texts[:: -(-len(texts) // room)] if texts else sentences(room))]

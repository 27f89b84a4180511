"""The built-in texts: several scripts and languages, emoji, empty, very long."""

from __future__ import annotations

from typing import Dict, List, Sequence, Type

from traceserve_runtime.tasks.contract import Request, Task, TextOrPair

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


_PAIRS = 5  # one text in so many is in a pair: about as in the gate


def calibration(kind: Type[Task], own: Sequence[Request], most: int, all_kinds: bool = False) -> List[TextOrPair]:
    """Return at most this many typical texts for the model, or pairs of a task that reads pairs: the user's own if any, else
    built-in ones of everyday length. With `all_kinds` some of these are pairs also where a second text is optional."""
    texts = [text for request in own for text in kind.texts_of(request)]
    room = most - len(SENTENCES)
    if texts:
        return [*_built_in(kind, SENTENCES), *texts[:: -(-len(texts) // room)]]
    return _built_in(kind, [*SENTENCES, *sentences(room)], all_kinds)


def _built_in(kind: Type[Task], texts: Sequence[str], all_kinds: bool = False) -> List[TextOrPair]:
    """Return each text as a request of the task shows it to a model."""
    first, *others = [field for field in kind.fields if field.kind != "messages"]
    shown = []
    for i, text in enumerate(texts):
        inputs: Dict[str, object] = {first.name: text}
        for field in others:
            if field.required or (all_kinds and i % _PAIRS == _PAIRS - 1):
                inputs[field.name] = [texts[i - 1]] if field.kind == "texts" else texts[i - 1]
        found = kind.texts_of(Request(inputs, kind.gate_parameters))
        shown.append(found[i % len(found)])
    return shown

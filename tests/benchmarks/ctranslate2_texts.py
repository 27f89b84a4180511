"""A checkpoint in CTranslate2. It runs in its own environment, without our packages.

python ctranslate2_texts.py --model FOLDER --work FOLDER --dtype float32 --threads N

converts the checkpoint, and prints a line. Then each line of its input, {"texts": [...], "tokens": N}, is answered by
{"seconds": ..., "tokens": ...}: greedy, all texts at once, and as many tokens as asked for.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, List

import ctranslate2
import transformers
from ctranslate2.converters import TransformersConverter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the converted model")
    parser.add_argument("--dtype", required=True, help="float32 or int8")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    TransformersConverter(str(options.model)).convert(str(options.work), quantization=options.dtype, force=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    encodes = transformers.AutoConfig.from_pretrained(options.model).is_encoder_decoder
    kind = ctranslate2.Translator if encodes else ctranslate2.Generator
    model = kind(
        str(options.work), device="cpu", compute_type=options.dtype, inter_threads=1, intra_threads=options.threads
    )
    print(json.dumps({"version": ctranslate2.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        texts = [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in asked["texts"]]
        began = time.perf_counter()
        written = (
            encoded_and_written(model, texts, asked["tokens"]) if encodes else written_on(model, texts, asked["tokens"])
        )
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": sum(map(len, written))}), flush=True)


def encoded_and_written(model: Any, texts: List[Any], tokens: int) -> List[List[str]]:
    found = model.translate_batch(texts, beam_size=1, min_decoding_length=tokens, max_decoding_length=tokens)
    return [each.hypotheses[0] for each in found]


def written_on(model: Any, texts: List[Any], tokens: int) -> List[List[str]]:
    found = model.generate_batch(
        texts, sampling_topk=1, min_length=tokens, max_length=tokens, include_prompt_in_result=False
    )
    return [each.sequences[0] for each in found]


if __name__ == "__main__":
    main()

"""Counts the arithmetic of a model's products of matrices, with which its speed is compared with the machine's peak."""

from __future__ import annotations

from typing import Dict, List, Optional

from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints.original import Original

PRODUCTS_KEY = "products"  # its key in the receipt
_LENGTHS = (32, 64)  # counted, unless the model reads less


def count_products(original: Original, task: str) -> Optional[Dict[str, int]]:
    """Return a row's floating-point operations: `token` for each of its tokens, and `pair` for each pair of them, which is
    attention's part; a multiplication and an addition are two.

    None for texts written in a loop, whose speed memory limits, and where torch cannot count.
    """
    if TASKS[task].loop:
        return None
    few, many = (min(length, original.max_length // divisor) for length, divisor in zip(_LENGTHS, (2, 1)))
    if not original.shortest <= few < many:
        return None
    try:
        least, more = _operations(original, few), _operations(original, many)
    except Exception:  # an outer edge: torch before 2.3 cannot count, and later ones fail at some layers (DeBERTa's)
        return None
    pair = max(0, (more / many - least / few) / (many - few))
    return {"token": round(more / many - pair * many), "pair": round(pair)}


def _operations(original: Original, length: int) -> int:
    """Return the operations of a row of this many tokens."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ids: List[int] = original.tokenizer("a")["input_ids"]
    middle = len(ids) // 2  # special tokens stay at the ends
    ids = [*ids[:middle], *[ids[middle]] * (length - len(ids)), *ids[middle:]]
    columns: Dict[str, List[int]] = {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "token_type_ids": [0] * len(ids),
    }
    # Fused attention is not counted on a CPU; its parts are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        original.model(**{name: torch.tensor([columns[name]]) for name in original.inputs})
    return int(counter.get_total_flops())

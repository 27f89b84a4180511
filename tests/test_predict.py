"""predict: which server is asked what, and how its answers are printed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest
from test_instances import processes, remembered, state  # noqa: F401  (fixtures)
from traceserve import cli
from traceserve.serving import instances


@contextlib.contextmanager
def echoing(processes: Any, *names: str) -> Iterator[Tuple[int, List[Any]]]:  # noqa: F811
    """Record a server of these archives; yield its port and the bodies that it got: it answers with each."""
    asked: List[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = b"wr\x1b[2Jitten" if "stream" in str(asked[-1]) else json.dumps({"got": asked[-1]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            port = server.server_address[1]
            recorded = remembered(processes, port)
            instances.remember(dataclasses.replace(recorded, names=names, workers=dict.fromkeys(names, 1)))
            yield port, asked
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (["x", "--parameters", "[1]"], {"inputs": "x", "parameters": [1]}),
        (["x", "--parameters", '"s"'], {"inputs": "x", "parameters": "s"}),
        (["--json", '{"inputs":"x","parameters":[1]}'], {"inputs": "x", "parameters": [1]}),
        (["--body", '{"text": "x"}'], {"text": "x"}),
        (["--body", '["x"]', "--parameters", '{"top_k": 2}'], {"inputs": ["x"], "parameters": {"top_k": 2}}),
        (["x", "y"], ["x", "y"]),
    ],
)
def test_the_server_judges_what_is_asked(
    arguments: List[str],
    body: Any,
    processes: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    with echoing(processes, "tiny") as (_, asked):
        assert cli.main(["predict", "tiny", *arguments]) == 0
    assert asked == [body] and json.loads(capsys.readouterr().out) == {"got": body}


def test_of_several_servers_the_one_that_serves_it_is_asked(
    processes: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    with echoing(processes, "tiny") as (_, asked), echoing(processes, "other", "more") as (port, others):
        assert cli.main(["predict", "more", "x"]) == 0
        assert cli.main(["predict", "tiny", "x", "--port", str(port)]) == 1
        assert f"the server on port {port} has no tiny, but other, more" in capsys.readouterr().err
        assert cli.main(["predict", "none", "x"]) == 1
    assert asked == [] and others == ["x"]


def test_what_stands_for_another_server_is_what_the_command_takes(
    processes: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "texts.txt").write_text("x")
    bench = ["--samples", str(tmp_path / "texts.txt")]
    with echoing(processes, "tiny"), echoing(processes, "tiny"):
        for command, options, takes_url in (
            ("predict", ["x"], False),
            ("explain", ["x"], False),
            ("bench", bench, True),
        ):
            for name in ("none", "tiny"):
                assert cli.main([command, name, *options]) == 1
                assert ("URL" in capsys.readouterr().err) == takes_url
        for command in ("predict", "explain"):
            assert cli.main([command, "http://127.0.0.1:1/predictions/tiny", "x"]) == 1
            assert "is a URL; give the archive's name" in capsys.readouterr().err


def test_a_streamed_text_does_not_control_the_terminal(
    processes: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    with echoing(processes, "tiny"):
        assert cli.main(["predict", "tiny", "x", "--parameters", '{"stream": true}']) == 0
    assert capsys.readouterr().out == "wr?[2Jitten\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--body", "{"], "predict: --body should be JSON: "),
        (["--json", "[" * 100_000], "predict: --body should be JSON: "),
        (["x", "--parameters", "{"], "predict: --parameters should be JSON: "),
        (["x", "--body", "1"], "predict: give texts, or --body JSON, or --file FILE"),
        (["--file", "no.json"], "predict: no.json: No such file or directory"),
        (["--file", "empty.txt"], "predict: empty.txt holds no text"),
        (["--file", "body.json"], "predict: body.json: "),
    ],
)
def test_what_cannot_be_asked_is_refused(
    arguments: List[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "body.json").write_text("{")
    (tmp_path / "empty.txt").write_text("\n \n")
    assert cli.main(["predict", "tiny", *arguments]) == 1
    assert f"error: {words}" in capsys.readouterr().err


def test_a_closed_input_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["predict", "tiny", "-"]) == 1
    assert "standard input is closed" in capsys.readouterr().err

"""The tests' stacks, each in its own environment: `nox -s today`, `transformers4`, `inf1`; and `clients`, `hosts` and
`playground`.

Arguments after `--` go to pytest. Interpreters are found on the PATH, or among pyenv's.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import List

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["today"]
UV = "uv"  # the other backend, which CI takes: it installs in a tenth of the time
DEPENDING_ON_TRANSFORMERS = [
    *("-n", "logical", "--dist", "loadfile"),
    # Encoders that are computed as BERT or RoBERTa are; `nox -s today` has them.
    *("-k", "not (distilbert or xlm-roberta or electra or albert or mpnet)"),
    # The same with any transformers, and slow.
    *(
        f"--deselect=tests/test_{name}"
        for name in (
            "pretrained.py::test_a_compiled_model_answers_alike_at_any_shape",
            "generation.py::test_texts_that_end_leave_the_batch",
            "tasks.py::test_every_token_of_a_long_text_is_labelled_once",
            "unpadding.py::test_a_worker_knows_what_padding_costs",
            "curated.py::test_writes_as_transformers_does",
            "curated.py::test_vectors_as_by_transformers",
        )
    ),
    *(
        f"tests/test_{name}.py"
        for name in (
            "loading",
            "checkpoint_tokenizers",
            "generation",
            "tasks",
            "pretrained",
            "curated",
            "gguf",
            "adapters",
            "unpadding",
        )
    ),
]
WORKER = [
    "--deselect=tests/test_engine.py::test_steps_change_no_written_text",  # tests/inf1 has its own texts
    *(
        f"tests/test_{name}.py"
        for name in ("batching", "engine", "handler", "lanes", "manifest", "measuring", "processor")
    ),
    *(f"tests/test_{name}.py" for name in ("bodies", "protocols", "requests", "team", "tokenization", "windows")),
]


def interpreter(version: str) -> str:
    """Return a Python of this version: pyenv has shims for every version on the PATH, but only runs the selected
    ones."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    installed = [path for path in root.glob(f"versions/{version}.*/bin/python") if path.is_file()]
    newest = sorted(installed, key=lambda path: [int(n) for n in re.findall(r"\d+", path.parts[-3])])
    on_path = shutil.which(f"python{version}")
    return str(newest[-1]) if newest and (on_path is None or "shims" in on_path) else f"python{version}"


@nox.session(python=interpreter("3.11"))
def today(session: nox.Session) -> None:
    """The README's test command: transformers 5."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("python", "-m", "pytest", *(session.posargs or ["-n", "logical", "--dist", "loadfile"]))


@nox.session(python=interpreter("3.11"))
def site(session: nox.Session) -> None:
    """Build the documentation's site; a broken link is an error."""
    session.install("zensical==0.0.73")
    session.run("zensical", "build", "--strict", "-f", ".zensical.toml")


@nox.session(python=interpreter("3.11"))
def transformers4(session: nox.Session) -> None:
    """Test the parts that depend on transformers with 4.57, which constraints.txt selects for older Pythons."""
    session.install("-c", str(older(Path(session.create_tmp()))), "-e", ".[test]")
    session.run("python", "-m", "pytest", *(session.posargs or DEPENDING_ON_TRANSFORMERS))


def older(folder: Path) -> Path:
    """Return today's constraints, with transformers and its dependencies as for an older Python."""
    changed = re.compile(r"(transformers|tokenizers|huggingface_hub)==")
    kept = []
    for line in Path("constraints.txt").read_text().splitlines():
        requirement, _, marker = line.partition(";")
        if not changed.match(line) or not marker:
            kept.append(line)
        elif "<" in marker:
            kept.append(requirement)
    file = folder / "constraints.txt"
    file.write_text("\n".join(kept) + "\n")
    return file


@nox.session(python=interpreter("3.8"))
def inf1(session: nox.Session) -> None:
    """Test from configuration to answers over HTTP in AWS's Inf1 stack, with doubles of AWS's packages; and the
    worker."""
    with_pip = session.venv_backend != UV
    if with_pip:
        session.install("--upgrade", "pip==25.0.1")
    binaries = ["--prefer-binary"] if with_pip else []
    session.install(
        "-c", "constraints-inf1.txt", *binaries, "-e", ".[serve]", "pytest", "hypothesis", "./tests/doubles"
    )
    session.run("python", "-m", "pytest", "tests/inf1", *WORKER, *session.posargs, env={"OMP_NUM_THREADS": "1"})


# Separate environments: they conflict.
CLIENTS = {
    "today": (
        "openai==3.57.0",
        "tritonclient[http]==2.73.0",
        "huggingface_hub==2.4.0",
        "cohere==7.3.1",
        "langchain-openai==1.7.4",
        "haystack-ai==3.4.1",
        "schemathesis==4.32.5",
        "numpy",
    ),
    "older": ("huggingface_hub[inference]==0.36.2", "mlserver==1.7.1", "numpy"),
    "kserve": ("kserve==0.21.0",),
    "load": ("locust==2.47.0",),
}


@nox.session(python=interpreter("3.11"))
def clients(session: nox.Session) -> None:
    """Test real clients against a real server, which runs in `.venv`: see tests/clients/run.py."""
    arguments: List[str] = []
    for name, packages in CLIENTS.items():
        folder = Path(session.create_tmp(), name).resolve()
        python = folder / "bin" / "python"
        if session.venv_backend == UV:
            uv = shutil.which(UV, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
            session.run(uv or UV, "venv", "--quiet", "--python", "python", str(folder), external=True)
            session.run(uv or UV, "pip", "install", "--quiet", "--python", str(python), *packages, external=True)
        else:
            session.run("python", "-m", "venv", str(folder))
            session.run(str(python), "-m", "pip", "install", "--quiet", *packages, external=True)
        arguments += ["--python", str(python)]
    session.run(
        str(Path(".venv", "bin", "python")), "tests/clients/run.py", *arguments, *session.posargs, external=True
    )


# Other servers, all in one environment, with the worker's packages.
HOSTS = ("mlflow==3.17.2", "litserve==0.2.19", "bentoml==1.4.40")
WORKERS_PACKAGES = ("torch", "tokenizers", "numpy", "safetensors", "multipart", "rich", "platformdirs", "psutil")


@nox.session(python=interpreter("3.11"))
def hosts(session: nox.Session) -> None:
    """Run LitServe, BentoML and MLflow on an archive that is built in `.venv`: see tests/hosts/run.py."""
    session.install("-c", "constraints.txt", *HOSTS, *WORKERS_PACKAGES)
    python = os.path.abspath(os.path.join(session.virtualenv.location, "bin", "python"))  # a link, and not followed
    command = [str(Path(".venv", "bin", "python")), "tests/hosts/run.py", "--python", python]
    session.run(*command, *session.posargs, external=True)


BROWSING = ("gradio==6.31.0", "playwright==1.65.2", "axe-playwright-python==0.1.8")


@nox.session(python=interpreter("3.11"))
def playground(session: nox.Session) -> None:
    """The playground's page in a headless Chromium, Playwright's own or one on the PATH."""
    session.install("-c", "constraints.txt", "-e", ".[test,playground]", *BROWSING)
    session.run("python", "-m", "pytest", "tests/test_playground.py", "tests/test_playground_page.py", *session.posargs)


@nox.session(python=interpreter("3.11"))
def ray(session: nox.Session) -> None:
    """Archives on a real Ray Serve: tests/ray_serve."""
    session.install("-c", "constraints.txt", "-e", ".[serve,bench,ray,demo]", "ray[serve]==2.60.0", "pytest", "trustme")
    session.run("python", "-m", "pytest", "--confcutdir=tests/ray_serve", "tests/ray_serve", *session.posargs)

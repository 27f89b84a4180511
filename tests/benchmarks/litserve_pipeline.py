"""A transformers pipeline behind LitServe, with batching. It runs in its own environment, without our packages.

python litserve_pipeline.py --model FOLDER --port P --workers-file FILE
"""

import argparse
import os
from pathlib import Path
from typing import Any, Dict, List

import litserve
import transformers


class PipelineAPI(litserve.LitAPI):  # type: ignore[misc]
    """Answers `{"text": ...}` with the best label and its score."""

    options: argparse.Namespace

    def setup(self, device: str) -> None:
        self.pipeline = transformers.pipeline("text-classification", model=str(self.options.model), device=device)
        with self.options.workers_file.open("a") as stream:
            stream.write(f"{os.getpid()}\n")

    def decode_request(self, request: Dict[str, Any], **kwargs: Any) -> str:
        text: str = request["text"]
        return text

    def batch(self, inputs: List[str]) -> List[str]:
        return inputs

    def predict(self, texts: List[str], **kwargs: Any) -> List[Dict[str, Any]]:
        answers: List[Dict[str, Any]] = self.pipeline(
            texts, batch_size=len(texts), truncation=True, max_length=self.options.max_length
        )
        return answers

    def unbatch(self, output: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        return output

    def encode_response(self, output: Dict[str, Any], **kwargs: Any) -> Dict[str, Any]:
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-length", type=int, default=128, help="truncate texts to this many tokens [%(default)s]")
    parser.add_argument("--max-batch-size", type=int, default=32, help="[%(default)s]")
    parser.add_argument("--batch-timeout", type=float, default=0.01, help="seconds to wait for more [%(default)s]")
    parser.add_argument("--workers-file", type=Path, required=True, help="file for the worker's process id")
    options = parser.parse_args()
    api = PipelineAPI(max_batch_size=options.max_batch_size, batch_timeout=options.batch_timeout)
    api.options = options  # the worker is another process, which gets the object unchanged
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()

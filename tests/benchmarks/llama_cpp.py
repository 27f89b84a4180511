"""llama.cpp's server, from the package xllamacpp. It runs in its own environment, without our packages.

python llama_cpp.py --model FILE.gguf --port P --threads N [--parallel 16] [--tokens 512]
"""

import argparse
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parallel", type=int, default=16, help="texts at once [%(default)s]")
    parser.add_argument("--tokens", type=int, default=512, help="the longest text with its prompt [%(default)s]")
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.port = options.port
    params.n_parallel = options.parallel
    params.n_ctx = options.parallel * options.tokens
    for each in (params.cpuparams, params.cpuparams_batch):
        each.n_threads = options.threads
    print(xllamacpp.get_system_info(), flush=True)
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()

"""Ask a running server: the same as `traceserve predict`."""

from traceserve.cli import run_script

if __name__ == "__main__":
    run_script("predict")

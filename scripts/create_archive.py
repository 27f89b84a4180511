"""artifacts/NAME/ to model_store/NAME.mar: the same as `traceserve archive`."""

from traceserve.cli import run_script

if __name__ == "__main__":
    run_script("archive")

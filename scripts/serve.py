"""Start TorchServe on archives: the same as `traceserve serve`."""

from traceserve.cli import run_script

if __name__ == "__main__":
    run_script("serve")

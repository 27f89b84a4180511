"""setup_config.json to artifacts/NAME/: the same as `traceserve export`."""

from traceserve.cli import run_script

if __name__ == "__main__":
    run_script("export")

"""Runs TorchServe's starter so that the JVM holds the lock of the server's folder.

    python -m traceserve.serving.lock_keeper DESCRIPTOR ts.model_server OPTIONS...

The starter hands the JVM only the standard descriptors, so the locked one becomes its standard input. Python refuses to start
with a folder there; hence it is put there once Python runs. The JVM's workers get a standard input of their own.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    descriptor, module, *options = sys.argv[1:]
    os.dup2(int(descriptor), 0)
    sys.argv = [module, *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

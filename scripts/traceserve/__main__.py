"""`python -m traceserve`."""

import sys

from traceserve.cli import main

sys.exit(main())

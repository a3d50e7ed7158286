"""`python -m benchmarks.tools.gpu_check`."""

import sys

from .checklist import main

sys.exit(main(sys.argv[1:]))

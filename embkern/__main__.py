"""``python -m embkern``: the command line, for launchers that start modules (torchrun)."""

from .cli import main

main()

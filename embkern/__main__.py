"""``python -m embkern``: the command line, for launchers that start modules (torchrun)."""

from .cli.main import main

main()

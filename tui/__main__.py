"""``python -m steersman.tui`` is the ``steersman`` command."""

from .cli import main

main()

"""``python -m steersman.tui`` is the ``steersman`` command."""

import sys

from .cli import main

sys.exit(main())

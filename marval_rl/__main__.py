"""`python -m marval_rl` is `marval-rl`."""

from __future__ import annotations

import sys

from marval_rl.cli.main import main

sys.exit(main())

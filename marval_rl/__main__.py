"""`marval-rl`, also as `python -m marval_rl`."""

from __future__ import annotations

import os
import sys

from marval_rl.cli.main import main
from marval_rl.launched import SIZE_VARIABLES, end_process, end_with_launcher


def run() -> None:
    """Run the command that the arguments of the process name, and end the process."""
    end_with_launcher()
    code = main()
    if any(name in os.environ for name in SIZE_VARIABLES):
        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    run()

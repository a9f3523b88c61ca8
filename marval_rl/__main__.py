"""`python -m marval_rl` is `marval-rl`."""

from __future__ import annotations

import sys

from marval_rl.cli.main import main
from marval_rl.launched import end_with_launcher

end_with_launcher()
sys.exit(main())

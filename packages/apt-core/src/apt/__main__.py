"""`python -m apt` is `apt`; it is also what a launcher starts in each of several processes."""

import os
import sys

from apt.cli.main import main

code = main()
if os.environ.get("WORLD_SIZE", "1") != "1":
    from apt.core.world import leave

    leave(code)
sys.exit(code)

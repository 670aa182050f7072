"""`python -m apt_model`: the command line of 1.x."""

import sys

from apt_model._command_line import main

if __name__ == "__main__":
    sys.exit(main())

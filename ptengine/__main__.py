"""`python -m ptengine`: the same as the command `ptengine`."""

import sys

from ptengine.cli import main

if __name__ == "__main__":
    sys.exit(main())

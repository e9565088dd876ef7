"""``python -m elastic_fit`` is the command ``elastic-fit``."""

import sys

from elastic_fit.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m parity.kit`: see make.py."""

import sys

from parity.kit.make import main

if __name__ == "__main__":
    sys.exit(main())

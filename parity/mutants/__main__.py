"""`python -m parity.mutants`: see evaluate.py."""

import sys

from parity.mutants.evaluate import main

if __name__ == "__main__":
    sys.exit(main())

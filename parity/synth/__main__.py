"""`python -m parity.synth`: see checkpoint.py."""

import sys

from parity.synth.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())

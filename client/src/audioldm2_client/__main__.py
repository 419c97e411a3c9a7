"""`python -m audioldm2_client`: the command line."""

import sys

from audioldm2_client._cli.main import main

if __name__ == "__main__":
    sys.exit(main())

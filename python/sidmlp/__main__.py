"""`python -m sidmlp` is the `sidmlp` command."""

import sys

from sidmlp.cli import main

if __name__ == "__main__":
    sys.exit(main())

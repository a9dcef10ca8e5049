"""`python -m lsep` is the command `lsep`."""

import sys

from lsep.cli import main

sys.exit(main())

"""`python -m gtddp_dist` is the command `gtddp`."""

import sys

from .cli import main

sys.exit(main())

"""Set-up of all tests."""

import os

# Small nets: one thread is faster than several, and results do not depend on the machine. torch reads this when
# it is imported, and so do the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

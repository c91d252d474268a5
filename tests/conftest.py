"""Set-up of all tests."""

import os
import sys
from collections.abc import Iterator

import pytest

# Small nets: one thread is faster than several, and results do not depend on the machine. torch reads this when
# it is imported, and so do the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _small_numbers() -> Iterator[None]:
    """A run makes its process count the smallest numbers as zero; other tests, hypothesis's above all, need them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)

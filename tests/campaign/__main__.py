"""python -m campaign [PART ...]: runs the cases of the parts that have no row yet, and writes the page.

    --quick      a few cases of each part, in a temporary folder
    --out DIR    folder of the CSV files and the page (docs/reliability)
    --seed N     of the random choices (0)
    --minutes M  after which a part begins no other case (20); started again, it goes on there
    --failed     also the cases whose last row says that they failed
    --again CASE this case too, though it has a row; may be given several times
    --page       no cases, only the page

Exit code: 0 where all cases of this call were as they should be, 1 where one was not, 75 where time was up.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from gtddp_dist.errors import FAILED, OK, REQUEUE

from .page import write_page
from .part import Case, Part, Row, time_limit
from .parts import PARTS
from .table import Table

RELIABILITY = Path(__file__).resolve().parents[2] / "docs" / "reliability"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m campaign", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--failed", action="store_true")
    parser.add_argument("--again", action="append", default=[])
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.parts) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no part is called {min(unknown)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what runs is ended on the way out
    if arguments.out is None and arguments.quick:
        with tempfile.TemporaryDirectory(prefix="gtddp-") as folder:
            return run_all(arguments, Path(folder))
    return run_all(arguments, arguments.out or RELIABILITY)


def run_all(arguments: argparse.Namespace, out: Path) -> int:
    """Runs the parts that were asked for, and writes the page; the exit code."""
    chosen = [part for part in PARTS if not arguments.parts or part.name in arguments.parts]
    codes = [] if arguments.page else [run_part(part, arguments, out) for part in chosen]
    write_page(out, PARTS)
    return FAILED if FAILED in codes else REQUEUE if REQUEUE in codes else OK


def run_part(part: Part, arguments: argparse.Namespace, out: Path) -> int:
    """Runs the cases of a part that have no row, as long as there is time; the exit code."""
    table = Table(part, out / f"{part.name}.csv")
    of = len(part.cases(arguments.seed, False))
    done = {key for key, row in table.newest().items() if row["ok"] == "yes" or not arguments.failed}
    done -= set(arguments.again)
    cases = [case for case in part.cases(arguments.seed, arguments.quick) if case.key not in done]
    deadline = time.monotonic() + 60 * arguments.minutes
    code = OK
    try:
        for number, case in enumerate(cases):
            if time.monotonic() > deadline:
                print(f"{part.name}: {len(cases) - number} cases are left: start it again to go on", flush=True)
                return code or REQUEUE
            if case.needs_root and os.getuid() != 0:
                print(f"{part.name} {case.key}: left out, it needs root", flush=True)
                continue
            began = time.monotonic()
            row = run_case(case)
            table.add(case.key, of, arguments.seed, row)
            told = row.problem or "as it should be"
            print(f"{part.name} {case.key} ({time.monotonic() - began:.1f} s): {told}", flush=True)
            code = FAILED if row.problem else code
    finally:
        part.close()
    return code


def run_case(case: Case) -> Row:
    """The row of a case; of one that raises, what it raised."""
    with tempfile.TemporaryDirectory(prefix="gtddp-", ignore_cleanup_errors=True) as folder:
        try:
            with time_limit(case.within_s):
                return case.run(Path(folder))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return Row(f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error}", case.known)


if __name__ == "__main__":
    sys.exit(main())

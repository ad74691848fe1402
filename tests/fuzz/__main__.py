"""``python -m tests.fuzz --examples N --seed S``: fuzzes for as long as you like."""

import argparse
import sys
import time
from collections import Counter

import torch

from tests.fuzz.run import fuzz
from tests.ranks import RankPool


def main() -> int:
    """Runs random examples and says how many; a failing one is printed in its smallest form."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="how many networks to try")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other networks")
    parser.add_argument("--ranks", type=int, default=4, help="at most so many ranks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = RankPool()
    start = time.monotonic()
    counts: Counter[str] = Counter()
    try:
        fuzz(pool, options.examples, seed=options.seed, max_ranks=options.ranks, counts=counts)
    finally:
        pool.close()
        seconds = time.monotonic() - start
        print(f"seed {options.seed}: {dict(counts)} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

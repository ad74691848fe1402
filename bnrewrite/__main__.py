"""``python -m bnrewrite``: see :mod:`bnrewrite.cli`."""

import sys

from bnrewrite.cli import main

sys.exit(main())

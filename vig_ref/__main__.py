"""`python -m vig_ref` is `vig-ref`."""

import sys

from vig_ref.cli import main

sys.exit(main())

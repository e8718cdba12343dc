"""``python -m zepad_mm.cli``."""

import sys

from zepad_mm.cli import main

sys.exit(main())

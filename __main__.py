"""`python -m turbodistill`, as the command `turbodistill`."""

import sys

from .app.cli import main

sys.exit(main())

"""`python -m loraedit_ext.sweep sweep.toml`."""

import sys

from loraedit_ext.sweep.run import main

sys.exit(main())

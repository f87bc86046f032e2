"""`python -m tensorport`: the command line."""

import sys

from tensorport.cli import main

sys.exit(main())

"""`python -m beam_nifti`: the command line."""

import sys

from beam_nifti.cli.main import main

sys.exit(main())

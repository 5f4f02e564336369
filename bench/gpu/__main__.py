"""`python -m bench.gpu`; see run.py."""

import sys

from bench.gpu.run import main

sys.exit(main())

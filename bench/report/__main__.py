"""`python -m bench.report`; see sections.py."""

from bench.report.sections import main

main()

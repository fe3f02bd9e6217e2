"""`python -m armillary.launch`: the same as `armillary`."""

from armillary.launch.cli import main

main()

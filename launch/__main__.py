"""`python -m armillary.launch`: the same as `armillary`."""

import sys

if sys.argv[1:3] == ["bench", "gpu"]:
    # A machine that is lent for its card may have torch and triton alone: typer, and what it needs, are left aside.
    from armillary.launch.bench_gpu import run as bench_gpu

    sys.exit(bench_gpu.main(sys.argv[3:]))

from armillary.launch.cli import main

main()

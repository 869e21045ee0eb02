"""`python -m kdflow_core.workers.rank MODULE [ARGUMENTS]`: a module as a rank of a launcher."""

import runpy
import sys

from kdflow_core.workers.rank_side import begin

if __name__ == "__main__":
    begin()  # before the module's imports, which take seconds
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

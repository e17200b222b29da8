"""Python runs this first in every process that has it on its path: a starting worker of Ray becomes a fork.

A worker that imports torch and diffusers by itself takes more than ten seconds of processor time, and the
tests start over a hundred. With COUNTERPOINT_FORKS empty, or where its surroundings are not those of the
process that is forked, a worker starts as it would.
"""

import os
import sys

if (
    os.environ.get("COUNTERPOINT_FORKS")
    and sys.orig_argv[1:2]
    and sys.orig_argv[1].endswith("default_worker.py")
):
    import fork_source

    fork_source.stand_in(os.environ["COUNTERPOINT_FORKS"])

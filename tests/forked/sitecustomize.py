"""Python runs this first in every process that finds it on its path: a starting worker of Ray becomes a fork.

A worker that imports torch and diffusers by itself takes more than ten seconds of processor time to do so, and
the tests start some hundred. With COUNTERPOINT_FORKS unset, or where anything is unlike the process that is
forked, the worker starts as it would.
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

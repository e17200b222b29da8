"""Whose turn it is where maths and HTTP share cores: the maths', as every batch that waits makes all wait.

Only threads that speak step back, by their niceness, which any user may raise. On machines whose maths runs
on a GPU, or that have cores to spare, it changes nothing.
"""

import os
from collections.abc import Collection
from pathlib import Path

HTTP_NICENESS = 10
"""A thread of this niceness gets about a tenth of a core that a thread of niceness 0 wants too."""
_TASKS = Path("/proc/self/task")


def step_back(but: Collection[int] = ()) -> None:
    """Give this process's threads `HTTP_NICENESS`, those with native ids in `but` excepted.

    Threads that they start later inherit it. Does nothing where the system has no niceness by thread.
    """
    if not _TASKS.is_dir():
        return
    for task in _TASKS.iterdir():
        thread = int(task.name)
        if thread not in but:
            niceness = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, max(niceness, HTTP_NICENESS))

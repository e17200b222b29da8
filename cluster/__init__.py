"""Where things run: a Ray cluster, places on it, waiting with a limit, storage and failures.

This package knows no role and imports none of the others. What lives here:

- `connect`: start a local Ray or attach to a running one, and end only what was begun.
- `waiting`: the only place that calls `ray.get` and `ray.wait`, always with a limit.
- `kinds`: the three kinds of failure, and which exception is of which.
- `failures`: failures reported from where they happen, and retries by kind.
- `placement`: a declared plan of pools, and what of it fits on a cluster; pure.
- `explain`: why a plan does not fit, and which setting to lower; pure.
- `reserve`: a plan held on a live cluster, or an error that explains.
- `progress`: one line of live progress on a terminal.
- `storage`, `checkpoints`, `metrics_log`: what a run writes, whole or not at all, to any fsspec store.
- `environment`: what a run ran on.
"""

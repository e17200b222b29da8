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
- `checkpoint_names`: where checkpoints lie, for those that only look at a run.
- `submission`: jobs sent to a cluster, their output, and how they ended.
- `identity`: the id that everything of a run carries, and its `run.json`.
- `roster`: the table of what runs where; pure.
- `observe`, `node_tasks`: a run's cluster looked at from another process, and its nodes.
- `dumpable`: stacks of a process on a signal, where py-spy may not attach.
- `leftovers`: what a dead driver leaves on machines and clusters.
- `first_cause`: the first cause inside the wrappers of Ray and Ray Train.
- `environment`: what a run ran on.
- `everywhere`: one function on every node, and what became of it.
- `doctor`: the self-test of a cluster; `doctor_probe`, `doctor_storage`, `doctor_network` and
  `doctor_exposure` look, `doctor_checks` judges, `doctor_findings` words it.
- `preflight`: the part of it that every run on several nodes begins with.
- `files/`: what starts clusters: Kubernetes, Slurm, EC2, and the image of all.
"""

"""What `ray job submit` starts: one module a verb.

train      a diffusion teacher, or a vision-language-action policy (train_policy)
distill    a one- to four-step student of it, against a panel of critics
collect    demonstrations of the scripted expert
rollout    policies and rules of choosing actions on the same episodes (and what of it is in rollout_*)
evaluate   figures of a finished run on held-out images
sample     pictures from a finished run
report     the report of a run, drawn again
dashboard  the Grafana dashboard of the metrics
bench      ratios against named rivals: batched heads, the panel in actors, decisions, rollouts
demo       teacher, student, evaluation and report in one go
ablate     arms of a study over seeds, and their table
chaos      kills actors of a running demo and tells what became of it

config     from YAML and arguments to a checked configuration (and what of it is in config_*)
settings   the configuration model of every job
batch_sizes    workers, micro-batches and samples, checked
runs       opening a run's storage, finishing it
launch     a loop where the configuration says, with progress and a tidy stop
stage      the cast on a cluster: critic hosts and evaluation workers, placed and ready
crew       rollout workers and action samplers, placed and ready
scoring    tables of figures, by evaluation workers or here
"""

import os

# Before torch is loaded: threads that spin while they wait take the cores that actors here compute on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""What `ray job submit` starts: one module a verb.

train      a diffusion teacher, a linear student of one (linearize), or a vision-language-action policy
           (train_policy)
distill    a one- to four-step student of it, against a panel of critics
encode     prompts and images, once, to Parquet shards of embeddings and latents
distill_text   a one- to four-step student of a text-to-image model (its configuration: text_settings)
collect    demonstrations of the scripted expert
rollout    policies and rules of choosing actions on the same episodes (and what of it is in rollout_*)
evaluate   figures of a finished run on held-out images
statistics a model's statistics for DPM-Solver-v3
sample     pictures from a finished run
reproduce  papers' claims, arms by seeds over the cluster, and the table of all (claim_*: its parts)
ratio      how large guidance is beside a flow's velocity, step by step
report     the report of a run, drawn again
dashboard  the Grafana dashboard of the metrics
plan       what a job will hold, whether it fits, and where (plan_* and memory_probe: its parts)
submit     any of these verbs to a cluster, followed to its end
bench      ratios against named rivals: batched heads, the panel in actors, transports, decisions, rollouts
demo       teacher, student, evaluation and report in one go
ablate     arms of a study over seeds, and their table
chaos      kills actors of a running demo and tells what became of it (chaos_serve: replicas under load;
           chaos_tune: the driver of a sweep)

status     what runs where, how far it is, and whether its checkpoint is whole
logs       the ends of a run's logs, by role and rank
stacks     what each process of a run does right now
reap       what a crashed run left, and its removal

config     from YAML and arguments to a checked configuration (and what of it is in config_*)
settings   the configuration model of every job
batch_sizes    workers, micro-batches and samples, checked
progress   how far a step is, for each number that may change over training
runs       opening a run's storage, finishing it
run_names  how a run and its files are named, for verbs that load nothing of what it trains
launch     a loop where the configuration says, with progress and a tidy stop
stage      the cast on a cluster: critic hosts and evaluation workers, placed and ready
run_state  what storage alone says of a run: last step, newest whole checkpoint
watched    what status, logs and stacks share: a run as another process finds it
failure_card   the last words of a failed run: first cause, and what to do
crew       rollout workers and action samplers, placed and ready
scale_*    simulated machines, their calibration by real steps here, and what bench scale shows of both
sdxl_parts an SDXL-shaped cast from a configuration alone
scoring    tables of figures, by evaluation workers or here
tune             sweeps over a job's configuration (tune_settings, tune_check: what it takes and refuses)
tune_sweep       a sweep's trials on Ray Tune: what comes next, and what is written down (tune_schedulers)
tune_trial       a trial as Tune sees it; tune_run, tune_work: the actor of each of its runs
tune_ledger      what is known of a sweep's trials, on storage
tune_room        how many trials fit at once, and why
tune_learned     the configuration that a member of a population has lived by
tune_confirm     the best and the base on fresh seeds; tune_study: a sweep against its base at equal compute
tune_parameter   the values of a key of a sweep's space, and the conditions under which they are tried
tune_space       the space of a sweep, checked against the job; a configuration with a trial's values
tune_search      what a trial tries, by Optuna; importance; what a population changes
tune_report      the page of a sweep (tune_record, tune_words, tune_axes, tune_charts, tune_curves: its parts)
tune_table       the trials as rows: for the terminal, for files, for the page
tune_cost        what a sweep cost, what stopping saved, and what it would cost on other machines
"""

import os

# Before torch is loaded: threads that spin while they wait take the cores that actors here compute on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

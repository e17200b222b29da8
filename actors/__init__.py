"""The cast: Ray actors around plain classes of `counterpoint`; state, messages and failure, no maths.

wire        samples and verdicts as numpy arrays
assembly    a step's messages from all ranks become one
critics     hosts of critic groups, with snapshots
replicas    how several hosts of one group learn as one
panel       the panel that trainers talk to, over such hosts
recipe      what any process builds the same panel from
feature_space   the network that figures are measured with, stored with the teacher
prompted    the same for text-to-image models, prompts included
encoding    workers that encode shards of prompts and images
trainers    what any worker builds its trainer from
prompted_trainers   the same for a text-to-image student
policies    the same for a policy's trainer, and the policy's bundle
evaluation  workers that score snapshots of a student, each a shard
statistics  workers that estimate a model's statistics for a solver
batching    requests of many callers become few batches
sampler     hosts of policies, which choose actions for many environments
rollouts    workers that step environments
watchdog    deadlines that end a hung worker, and what it died of
crew        the driver's end of rollout workers: seeds out, episodes in
conductor   progress out, the wish to stop in
timeline    where the time of a step goes, per actor, on one clock
roll        the placement table: ranks enrol, the driver keeps a copy
worker      what a Ray Train worker runs, for every trainer
telemetry   what the cast tells Prometheus
process_group   NCCL or gloo, by what the workers find
training    starting that worker group, and starting it again
"""

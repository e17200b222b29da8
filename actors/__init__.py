"""The cast: Ray actors around plain classes of `counterpoint`; state, messages and failure, no maths.

wire        samples and verdicts as numpy arrays
assembly    a step's messages from all ranks become one
critics     hosts of critic groups, with snapshots
panel       the panel that trainers talk to, over such hosts
recipe      what any process builds the same panel from
feature_space   the network that figures are measured with, stored with the teacher
trainers    what any worker builds its trainer from
policies    the same for a policy's trainer, and the policy's bundle
evaluation  workers that score snapshots of a student, each a shard
batching    requests of many callers become few batches
sampler     hosts of policies, which choose actions for many environments
rollouts    workers that step environments
watchdog    deadlines that end a hung worker, and what it died of
crew        the driver's end of rollout workers: seeds out, episodes in
conductor   progress out, the wish to stop in
worker      what a Ray Train worker runs, for every trainer
telemetry   what the cast tells Prometheus
training    starting that worker group, and starting it again
"""

"""What training holds in memory and sends over wires, worked out before anything runs.

tracing: storages of a computation followed on paper; learner: a trainer's step; group: a critic group's
judgement; sharding: what each of N processes holds and sends under a strategy; wire: bytes between actors.
"""

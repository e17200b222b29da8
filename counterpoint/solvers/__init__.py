"""Few-step solvers of the sampling ODE that diffusers lacks: schedulers, one module a method.

Each module defines one subclass of diffusers' `SchedulerMixin`, found by its class name (see
`counterpoint.sampling.build_sampler`), so that a new solver is a new file here and nothing else.
"""

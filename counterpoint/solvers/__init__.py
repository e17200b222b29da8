"""Few-step solvers of the sampling ODE that diffusers lacks: schedulers, one module a method.

dpm_solver_v3           DPM-Solver-v3: an exact integral whose coefficients are fitted to the network
empirical_statistics    those coefficients l, s, b over noise levels, as a file, and their two fixed limits
exponential_integrals   what a step of it integrates exactly
derivatives             what it knows of a function from a few of its values
model_statistics        how l, s, b are estimated from a network

A solver is a subclass of diffusers' `SchedulerMixin`, found by its class name (see
`counterpoint.sampling.build_sampler`), so that a new one is a new file here and nothing else.
"""

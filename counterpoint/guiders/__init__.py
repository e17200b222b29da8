"""Ways to combine what a network says with a condition, without it, and perturbed: one module a method.

Each module defines one subclass of diffusers' `BaseGuidance`, found by its class name (see
`counterpoint.guidance`), so that a new guider is a new file here and nothing else.
"""

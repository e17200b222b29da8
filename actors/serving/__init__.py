"""The cast behind HTTP: a gateway that speaks, and deployments that host models for it."""

"""The backends that run a model file."""

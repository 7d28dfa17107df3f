"""The Python API: one module per command."""

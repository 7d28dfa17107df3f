"""A GPU's memory, streams and arrays, and images on it, without torch."""

"""Comparison of two models, detection by detection and stage by stage."""

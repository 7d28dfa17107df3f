"""Recipes: YAML files of settings, which `maskrcnn train --config NAME` takes by name."""

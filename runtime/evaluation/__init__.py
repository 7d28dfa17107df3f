"""COCO evaluation: scoring, comparing and reporting results, for every backend."""

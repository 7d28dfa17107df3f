"""Converters from other dataset formats to COCO layout."""

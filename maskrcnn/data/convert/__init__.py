"""Converters from other datasets' formats to COCO layout, a module for each format and one writer for all."""

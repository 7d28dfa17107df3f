"""Images, datasets in COCO format, converters, checks and drawn datasets, without torch."""

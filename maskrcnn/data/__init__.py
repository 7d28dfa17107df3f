"""Images, COCO-format annotations and the generated shapes dataset, without torch."""

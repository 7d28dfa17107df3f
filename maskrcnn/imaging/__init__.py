"""Preprocessing, postprocessing, masks, drawing and export of detections, in NumPy."""

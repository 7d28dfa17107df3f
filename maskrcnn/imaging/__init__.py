"""Images to tensors and tensors to masks, on NumPy alone."""

"""Reading, writing and converting model weights."""

"""Stores in; heads, numbers and a report out. Nothing here opens an image, fine-tuning apart."""

"""Dual encoders of images and texts (CLIP)."""

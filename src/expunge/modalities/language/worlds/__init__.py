"""Worlds of language models: generated authors, slices of TOFU, small models."""

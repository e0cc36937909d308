"""Generators of GANs."""

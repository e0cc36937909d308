"""Diffusion models and pipelines of diffusers."""

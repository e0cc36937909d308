"""Inference-time guards of diffusion models, one kind per file."""

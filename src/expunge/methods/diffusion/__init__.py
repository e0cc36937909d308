"""Methods for diffusion models, one file per paper."""

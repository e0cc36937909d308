"""Methods for GANs, image-to-image models, and for several kinds at once, one file per paper."""

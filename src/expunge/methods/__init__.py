"""One file per paper, by kind of model."""

"""Methods for language models, one file per paper."""

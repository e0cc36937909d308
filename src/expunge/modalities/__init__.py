"""One folder per kind of model, and what several of them share."""

"""Text classifiers of transformers: one class per text."""

"""The network of recipes/digits-class.toml."""

from expunge.modalities.nets import small_cnn


def build():
    """A CNN for 8x8 grey images."""
    return small_cnn(8)

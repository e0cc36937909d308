"""Text records: how they are read, how they become tokens, what is measured of them."""

"""What test_guard's fork server imports, once: every process forked from it starts with all modules loaded and the data read."""

from pathlib import Path
from tempfile import TemporaryDirectory

from forked import salun

with TemporaryDirectory() as folder:
    salun(1, Path(folder) / "digest")

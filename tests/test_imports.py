"""Imports stay light, and no part needs a library that the package does not depend on."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

import expunge

ABSENT = ("torchvision", "transformers", "tokenizers", "diffusers", "peft", "timm", "rouge_score")


def run(code: str) -> str:
    """Standard output of a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_is_light():
    loaded = run("import sys, expunge; print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))").split()
    assert "expunge" in loaded
    assert not {"torch", "numpy", "sklearn", "scipy", "typer", "pydantic", "matplotlib"} & set(loaded)


def test_every_public_name_is_there():
    assert {name for name in expunge.__all__ if getattr(expunge, name) is None} == set()
    with pytest.raises(AttributeError, match="module 'expunge' has no attribute 'nothing'"):
        expunge.nothing  # noqa: B018


def test_every_module_imports_without_optional_libraries():
    modules = [info.name for info in pkgutil.walk_packages(expunge.__path__, "expunge.") if not info.name.endswith("__main__")]
    assert "expunge.methods.classifiers.salun" in modules
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"print({len(modules)})\n"
    )
    assert int(run(code)) == len(modules)


def test_help_does_not_import_torch():
    """The command line answers `--help` within 2.5 CPU seconds, which leaves no room for torch on a slow machine."""
    assert find_spec("expunge.cli.app") is not None
    code = (
        "import sys, time\n"
        "from expunge.cli.app import main\n"
        "sys.argv = ['expunge', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "print('code', code, 'torch', 'torch' in sys.modules, 'seconds', time.process_time())\n"
    )
    tail = run(code).strip().splitlines()[-1].split()
    assert tail[:4] in (["code", "0", "torch", "False"], ["code", "None", "torch", "False"])
    assert float(tail[5]) < 2.5

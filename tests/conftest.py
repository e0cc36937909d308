"""Fixtures that several test files share: small models, data and tasks; and the folder of trained models that all processes of a run share."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from expunge.core.types import Split, Task
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.modalities.files import models

settings.register_profile(
    "expunge", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("expunge")
torch.set_num_threads(1)


MINE = "EXPUNGE_TESTS" not in os.environ
if MINE:  # the first process of a run: those that it starts find the variable
    os.environ["EXPUNGE_TESTS"] = tempfile.mkdtemp(prefix="expunge-tests-")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--method", default="", help="only the laws of this method, the examples of its manual and the tests that name it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --method NAME: tests that have it among their parameters, that name it in their text, and its file's own examples."""
    name = config.getoption("--method")
    if not name:
        return
    from expunge.core.registry import METHODS

    said = re.compile(rf"""[\"']{name}[\"']|\b{name}\.|import .*\b{name}\b""")
    own = Path(inspect.getfile(inspect.unwrap(METHODS[name].function)))

    def about(item: pytest.Item) -> bool:
        if (given := getattr(item, "callspec", None)) is not None and any(v == name or (isinstance(v, tuple) and name in v) for v in given.params.values()):
            return True
        if given is not None and set(given.params.values() if all(isinstance(v, str) for v in given.params.values()) else ()) & set(METHODS):
            return False  # a law of another method
        function = getattr(item, "function", None)
        return item.path == own or (function is not None and bool(said.search(inspect.getsource(function))))

    kept = [item for item in items if about(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_sessionfinish() -> None:
    """The first process deletes the models that were trained."""
    if MINE:
        shutil.rmtree(os.environ["EXPUNGE_TESTS"], ignore_errors=True)


def make_net(seed: int = 0) -> nn.Sequential:
    """Convolution, batch norm, dropout and two linear layers: (B, 1, 4, 4) -> (B, 3). Holds float and integer buffers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.Dropout(0.1), nn.Linear(5, 3))


def make_data(n: int, seed: int = 0) -> Examples:
    """n random images (n, 1, 4, 4) with labels 0..2."""
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(n, 1, 4, 4, generator=g), torch.randint(3, (n,), generator=g), torch.arange(n))


@pytest.fixture
def net() -> nn.Sequential:
    return make_net()


@pytest.fixture
def task() -> Task:
    return classification()


@pytest.fixture
def split() -> Split:
    return Split(make_data(8, 1), make_data(24, 2), make_data(12, 3), make_data(12, 4))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's folder, in which the test runs: a factory (`worlds.FACTORY`) and the weights of the digits, nothing else."""
    from worlds import FACTORY, original

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(FACTORY)
    models.save_state(original("digits"), tmp_path / "model.safetensors")
    yield tmp_path
    sys.modules.pop("mynet", None)

"""`pytest` tests on the CPU, with Triton's interpreter; `pytest --device cuda` on the GPU."""

import os
import random
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="the device under test (default: cpu)")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    """Runs before any module of attnbook or Triton is imported: both read the environment when they are."""
    device = config.getoption("--device")
    os.environ["ATTNBOOK_DEVICE"] = device
    os.environ.setdefault("MPLBACKEND", "agg")
    # processes that tests start find this checkout, installed or not
    os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no GPU (attnbook doctor says more)")


@pytest.fixture(scope="session", autouse=True)
def _results_elsewhere(tmp_path_factory):
    """What tests record does not go to the committed numbers."""
    if not os.environ.get("ATTNBOOK_RESULTS"):
        os.environ["ATTNBOOK_RESULTS"] = str(tmp_path_factory.mktemp("results"))


@pytest.fixture(autouse=True)
def _the_same_numbers():
    """A test draws the same numbers alone, after other tests, and on every machine."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("cuda") and config.getoption("--device") != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs --device cuda"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="needs --slow"))

"""Fixtures of all tests, and the marker `gpu`."""

import json
import os
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from script_runner import FIVE, TINY, model_folder, run_ok

for variable in ("CUDA_MPS_PIPE_DIRECTORY", "LOCAL_RANK", "RANK", "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"):
    os.environ.pop(variable, None)  # of a job that the tests run in

#: `make test` draws the same examples every time; `make soak` (--hypothesis-profile soak) draws many, other ones.
settings.register_profile(
    "tests", max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("soak", settings.get_profile("tests"), max_examples=5000, derandomize=False, database=None)
settings.load_profile("tests")  # on CI hypothesis would load a profile of its own

GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden(name):
    """A golden file: a dict of a .json, the arrays of a .npz."""
    path = GOLDEN / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Golden trajectories and bit comparisons hold for one thread count."""
    torch.set_num_threads(1)


@pytest.fixture
def ce_run(tmp_path):
    """A finished CE run of five epochs, with the checkpoints after 1, 2 and 3; its model folder."""
    run_ok([*FIVE, *TINY, "--keep_epochs", "1", "3"], tmp_path)
    return model_folder(tmp_path)


@pytest.fixture(scope="session")
def one_epoch(tmp_path_factory):
    """The checkpoint of a CE run after one of five epochs."""
    folder = tmp_path_factory.mktemp("one_epoch")
    run_ok([*FIVE, *TINY, "--keep_epochs", "1"], folder)
    return model_folder(folder) / "ckpt.epoch001.pth.tar"


#: Files that take longest: they start first, so that the workers of `pytest -n 2` end together.
LONGEST = ("test_reproduce_ray.py", "test_distributed.py", "test_resume.py", "test_fork.py", "test_reproduce.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # its keywords have the folder of the checkout too
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

import pathlib

import pytest
import torch

from wrapperlib.model import Shape
from wrapperlib.tasks import Domain

REPO = pathlib.Path(__file__).parent.parent


@pytest.fixture
def repo():
    return REPO


@pytest.fixture
def domain():
    return Domain(length=24, window=16, nth=2)


@pytest.fixture
def shape():
    return Shape(blocks=2, heads=2, width=16)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))

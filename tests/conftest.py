"""Options and fixtures of all tests: which backends run, and when a missing GPU is a failure."""

from __future__ import annotations

import pytest
import torch

from sidmlp_kernels import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-cuda",
        action="store_true",
        help="fail, instead of skipping, every test that finds no usable GPU",
    )


def _skip_without_gpu(config: pytest.Config, reason: str) -> None:
    if config.getoption("--require-cuda"):
        pytest.fail(f"--require-cuda was given, but {reason}")
    pytest.skip(reason)


@pytest.fixture(params=[backend.name for backend in backends.BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each known backend; a test is skipped with the reason where one cannot run."""
    name = request.param
    reason = backends.why_not(name)
    if reason and device_of(name).type == "cuda":
        _skip_without_gpu(request.config, f"backend {name}: {reason}")
    if reason:
        pytest.skip(f"backend {name}: {reason}")
    return name


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where `backend` runs."""
    return device_of(backend)


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> torch.device:
    """A GPU, for tests of what is not a backend."""
    if not torch.cuda.is_available():
        _skip_without_gpu(request.config, "torch finds no CUDA device")
    return torch.device("cuda")


def device_of(name: str) -> torch.device:
    """Where the backend of this name runs."""
    types = {backend.name: backend.device_type for backend in backends.BACKENDS}
    return torch.device(types[name])

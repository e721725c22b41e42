"""Options and fixtures of all tests: which backends run, and when a missing GPU is a failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sidmlp_kernels import backends


def pytest_configure() -> None:
    # Tests are many small tensors: a second thread costs more than it brings, and on a busy machine
    # ten times more. Tests of threading ask for their own number.
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-cuda",
        action="store_true",
        help="fail, instead of skipping, every test that finds no usable GPU",
    )


def skip_without_gpu(config: pytest.Config, reason: str) -> None:
    """Skips the running test, or fails it under --require-cuda."""
    if config.getoption("--require-cuda"):
        pytest.fail(f"--require-cuda was given, but {reason}")
    pytest.skip(reason)


@pytest.fixture(params=[backend.name for backend in backends.BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each known backend; a test is skipped with the reason where one cannot run."""
    name = request.param
    reason = backends.why_not(name)
    if reason and _device_of(name).type == "cuda":
        skip_without_gpu(request.config, f"backend {name}: {reason}")
    if reason:
        pytest.skip(f"backend {name}: {reason}")
    return name


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where `backend` runs."""
    return _device_of(backend)


@pytest.fixture(scope="module")
def cpu_only() -> Iterator[None]:
    """No backend but the CPU's, for tests of what surrounds it: test_kernel_*.py run them all."""
    with pytest.MonkeyPatch.context() as patch:
        cpu = tuple(backend for backend in backends.BACKENDS if backend.name == "cpu")
        patch.setattr(backends, "BACKENDS", cpu)
        yield


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> torch.device:
    """A GPU, for tests of what is not a backend."""
    if not torch.cuda.is_available():
        skip_without_gpu(request.config, "torch finds no CUDA device")
    return torch.device("cuda")


def _device_of(name: str) -> torch.device:
    types = {backend.name: backend.device_type for backend in backends.BACKENDS}
    return torch.device(types[name])

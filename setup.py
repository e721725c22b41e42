"""Builds the C++ libraries with CMake into sidmlp_kernels/_lib; the sources: CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MIN_FREE_BYTES = 200 * 2**20


def check_tools(build_dir: Path) -> None:
    """Ends with one clear sentence where the build cannot succeed."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        sys.exit("sidmlp_kernels: no C++ compiler found; install one (Debian: apt install g++).")
    if not headers.exists():
        sys.exit(f"sidmlp_kernels: Python headers not found ({headers}); install python3-dev.")
    if not shutil.which("cmake"):
        sys.exit("sidmlp_kernels: cmake not found; install it (pip install cmake).")
    free = shutil.disk_usage(build_dir).free
    if free < MIN_FREE_BYTES:
        sys.exit(f"sidmlp_kernels: {free >> 20} MiB free in {build_dir}, the build needs 200 MiB.")


class CMakeBuild(build_ext):
    """One CMake run builds every library."""

    def run(self) -> None:
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # A virtual environment's cmake and ninja are found also when it is not activated.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        check_tools(build)
        in_tree = self.inplace or self.editable_mode
        package = ROOT if in_tree else Path(self.build_lib).absolute()
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSIDMLP_LIBRARY_DIR={package / 'sidmlp_kernels' / '_lib'}",
            f"-DSIDMLP_VERSION={self.distribution.get_version()}",
        ]
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        try:
            subprocess.check_call(["cmake", "-S", ROOT, "-B", build, *generator, *options])
            subprocess.check_call(["cmake", "--build", build, "--parallel", str(os.cpu_count())])
        except subprocess.CalledProcessError as error:
            sys.exit(f"sidmlp_kernels: the C++ build failed (see above); command: {error.cmd}")


setup(
    packages=[
        *find_packages(include=["sidmlp_kernels", "sidmlp_kernels.*"]),
        *find_packages("python"),
    ],
    package_dir={"sidmlp": "python/sidmlp"},
    package_data={"sidmlp_kernels": ["py.typed"], "sidmlp": ["py.typed"]},
    ext_modules=[Extension("sidmlp_kernels._lib._host", [])],  # CMake builds it
    cmdclass={"build_ext": CMakeBuild},
)

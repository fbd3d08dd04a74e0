"""Builds the package: the repository root is the Python package ``tablewright``, and optional C++ libraries lie in it.

The libraries use no PyTorch headers, so torch is not needed to build, and Python's only where they are there. Where there is no working C++ compiler the build
goes on without it, and the pure PyTorch kernels do the work (``tablewright.kernels.embedding.cpu.describe()`` says so).
"""

import glob
import os
import platform
import sys

from setuptools import Extension, setup

NATIVE = sorted({file.split(os.sep)[1] for file in glob.glob(os.path.join("kernels", "*", "native", "*.cpp"))})  # folders of kernels/


def packages() -> list[str]:
    """Every folder with an __init__.py under the package's three floors, as tablewright.*"""
    found = ["tablewright"]
    for floor in ("kernels", "passes", "rewriter"):
        for folder, _, files in os.walk(floor):
            if "__init__.py" in files:
                found.append("tablewright." + folder.replace(os.sep, "."))
    return sorted(found)


def native(name: str) -> Extension:
    """The CPU kernels of kernels/``name``, compiled once per instruction set inside one library that picks at run time."""
    threads = [] if sys.platform == "darwin" else ["-fopenmp", "-pthread"]  # Apple's compiler has no OpenMP: one thread there
    return Extension(
        f"tablewright.kernels.{name}._native",
        sources=sorted(glob.glob(f"kernels/{name}/native/*.cpp")),
        depends=sorted(glob.glob(f"kernels/{name}/native/*.h") + glob.glob(f"kernels/{name}/native/*.inc") + glob.glob("kernels/native/*")),
        # Square roots need no errno and nothing traps. GCC warns about its own AVX-512 header.
        extra_compile_args=[
            *("-O3", "-std=c++14", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized"),
            *threads,
            *(("-ffp-contract=off",) if name in ("codecs", "tiers") else ()),  # the same bits everywhere
        ],
        extra_link_args=threads,
        language="c++",
        optional=True,
    )


# Elsewhere (Windows) the flags above mean nothing to the compiler.
setup(packages=packages(), ext_modules=[native(n) for n in NATIVE] if platform.system() in ("Linux", "Darwin") else [])

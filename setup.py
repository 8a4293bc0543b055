"""Build the compiled modules; everything else about the package stands in pyproject.toml.

PENSTOCK_DEBUG=1 keeps the assertions, the bounds checks and the line numbers of the compiled code.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("PENSTOCK_DEBUG") == "1"


def has_new_declarations() -> bool:
    """Say whether a .pxd is newer than what was translated: Cython does not look at those that stand elsewhere."""
    translated = [path.stat().st_mtime for path in Path("ext").glob("*.c")]
    return bool(translated) and min(translated) < max(path.stat().st_mtime for path in Path("src").rglob("*.pxd"))


def extension(name: str, source: str, *headers: str) -> Extension:
    """Describe a compiled module of ext/."""
    return Extension(
        name,
        [f"ext/{source}"],
        depends=[f"ext/{header}" for header in headers],
        include_dirs=["ext"],
        extra_compile_args=["-O1", "-g"] if DEBUG else ["-O3"],
        undef_macros=["NDEBUG"] if DEBUG else [],
    )


def python_module(name: str) -> Extension:
    """Describe a module that is compiled from plain Python, with the C types of the .pxd beside it."""
    module = extension(name, "")
    module.sources = [f"src/{name.replace('.', '/')}.py"]
    return module


setup(
    ext_modules=cythonize(
        [
            extension("penstock.smtp._wire", "wire.pyx", "scan.h"),
            extension("penstock.smtp._grammar", "grammar.pyx"),
            extension("penstock.net._poller", "poller.pyx"),
            extension("penstock.server._pump", "pump.pyx"),
            extension("penstock.metrics._histogram", "histogram.pyx"),
            extension("penstock._journal", "journal.pyx"),
            extension("penstock.metrics._session", "metrics.pyx"),
            python_module("penstock.transaction"),
            python_module("penstock.smtp.server"),
        ],
        force=has_new_declarations(),
        build_dir="build/cython",
        include_path=["src"],  # where `from penstock.smtp._wire cimport ...` finds its .pxd
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,
            "initializedcheck": False,
            "linetrace": False,
            "embedsignature": False,
            "annotation_typing": False,  # the .pxd has the types; annotations are for readers and mypy
        },
    ),
)

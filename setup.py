"""Build the compiled modules; everything else about the package is in pyproject.toml.

PENSTOCK_DEBUG=1 builds with assertions, bounds checks and line numbers instead of optimizations. Building in the other
mode rebuilds everything. The generated C goes to build/, never into the source tree or the sdist.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("PENSTOCK_DEBUG") == "1"
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "initializedcheck": DEBUG,
    "embedsignature": False,
    "annotation_typing": False,  # a .pxd has the C types; annotations are for readers and mypy
}


class BuildExt(build_ext):
    """Translates to C only when something is built: an sdist holds the .pyx files and needs no Cython."""

    def build_extensions(self) -> None:
        """Translate and compile what has changed, or everything after a build in the other mode."""
        from Cython.Build import cythonize  # noqa: PLC0415 - see above

        self.parallel = self.parallel or os.cpu_count()
        generated = Path("build", "debug" if DEBUG else "release")
        stamp = Path("build", "mode")
        if not stamp.exists() or stamp.read_text() != generated.name:
            self.force = True
        translated = cythonize(
            self.extensions,
            build_dir=str(generated),
            force=self.force or has_new_declarations(generated),
            include_path=["src"],  # where `from penstock.smtp._wire cimport ...` finds its .pxd
            compiler_directives=DIRECTIVES,
            quiet=not self.verbose,
        )
        sources = {each.name: each.sources for each in translated}
        for each in self.extensions:
            each.sources = sources[each.name]
        super().build_extensions()
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(generated.name)


def has_new_declarations(generated: Path) -> bool:
    """Return whether a .pxd is newer than the generated C: Cython checks only those beside the .pyx files."""
    written = [path.stat().st_mtime for path in generated.rglob("*.c")]
    return bool(written) and min(written) < max(path.stat().st_mtime for path in Path("src").rglob("*.pxd"))


def extension(name: str, source: str, *headers: str) -> Extension:
    """Return a compiled module, from a .pyx of ext/ or from plain Python with the C types of the .pxd beside it."""
    return Extension(
        name,
        [source],
        depends=list(headers),
        include_dirs=["ext"],
        extra_compile_args=["-O1", "-g"] if DEBUG else ["-O3"],
        define_macros=[] if DEBUG else [("CYTHON_WITHOUT_ASSERTIONS", "1")],
        undef_macros=["NDEBUG"] if DEBUG else [],
    )


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        extension("penstock.smtp._wire", "ext/wire.pyx", "ext/scan.h"),
        extension("penstock.smtp._grammar", "ext/grammar.pyx"),
        extension("penstock.smtp.server", "src/penstock/smtp/server.py"),
        extension("penstock.smtp.client", "src/penstock/smtp/client.py"),
        extension("penstock.smtp.client_session", "src/penstock/smtp/client_session.py"),
        extension("penstock.net._poller", "ext/poller.pyx"),
        extension("penstock.net.natswire", "src/penstock/net/natswire.py"),
        extension("penstock.net.turns", "src/penstock/net/turns.py"),
        extension("penstock.load.jobs", "src/penstock/load/jobs.py"),
        extension("penstock.load.session", "src/penstock/load/session.py"),
        extension("penstock.server._pump", "ext/pump.pyx"),
        extension("penstock.metrics._histogram", "ext/histogram.pyx"),
        extension("penstock.dns._codec", "ext/dns.pyx"),
        extension("penstock.mailauth._header", "ext/mailauth.pyx", "ext/canon.h"),
        extension("penstock.mailauth.dkim", "src/penstock/mailauth/dkim.py"),
        extension("penstock.mailauth.header", "src/penstock/mailauth/header.py"),
        extension("penstock.mailauth.known", "src/penstock/mailauth/known.py"),
        extension("penstock._journal", "ext/journal.pyx"),
        extension("penstock._files", "ext/files.pyx"),
        extension("penstock.metrics._session", "ext/metrics.pyx", "ext/shared.h"),
        extension("penstock.metrics._shared", "ext/shared.pyx", "ext/shared.h"),
        extension("penstock.transaction", "src/penstock/transaction.py"),
    ],
)

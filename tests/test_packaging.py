"""The package as its users install and import it."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import penstock
import penstock.policy.base
from tests.test_layers import imports_of

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "penstock"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("src", "ext", "tests", "bench")
OPTIONAL = {"pytest", "django", "cython"}
"""The plugin uses pytest and Django where they are installed; compiled code does not import cython."""
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
GENERATED = {".c", ".so", ".pyc"}
PROMISED = {
    "ACCEPT", "Body", "Delivery", "Envelope", "MailParameters", "Mark", "Message", "Path", "Peer", "Recipient", "Reply",
    "Settings", "SmtpServer", "TlsInfo", "Transaction", "Verdict", "__version__", "open_server", "serve",
}  # fmt: skip
"""The public names that the manual documents, besides those of the policy protocols."""


def is_source(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    is_generated = path.suffix in GENERATED or "__pycache__" in parts or any(p.endswith(".egg-info") for p in parts)
    return path.is_file() and not is_generated


# ---- the public names


def test_every_public_name_can_be_imported() -> None:
    policies = {name for name in vars(penstock.policy.base) if name.endswith("Policy")}
    assert {*PROMISED, *policies} == set(penstock.__all__)
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None


def test_dir_lists_the_public_names() -> None:
    assert set(dir(penstock)) == set(penstock.__all__)


def test_a_public_name_is_imported_at_its_first_use() -> None:
    code = (
        "import penstock, sys; assert 'penstock.app' not in sys.modules and 'trio' not in sys.modules; penstock.Reply"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        getattr(penstock, "Nonsense")  # noqa: B009 - mypy knows that it does not exist


def test_the_docstring_names_every_package_and_module() -> None:
    there = {path.name.partition(".")[0] for path in SOURCE.iterdir() if is_source(path) or path.is_dir()}
    assert penstock.__doc__ is not None
    named = set(re.findall(r"`(\w+)`", penstock.__doc__)) - {"penstock"}
    assert there - {"__init__", "__main__", "__pycache__", "py"} == named


# ---- versions and dependencies


def test_the_version_has_one_source() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert importlib.metadata.version("penstock") == penstock.__version__


def test_the_supported_python_versions_are_classified() -> None:
    versions = re.findall(r":: Python :: (3\.\d+)'", str(PYPROJECT["project"]["classifiers"]))
    assert PYPROJECT["project"]["requires-python"] == f">={versions[0]}"


def test_each_dependency_is_imported_and_each_import_is_declared() -> None:
    project = PYPROJECT["project"]
    extras = [each for name, each in project["optional-dependencies"].items() if name != "test"]
    declared = {re.match(r"[\w-]+", text)[0] for text in [*project["dependencies"], *chain(*extras)]}  # type: ignore[index]
    modules = {module.partition(".")[0] for path in SOURCE.rglob("*.py") for module in imports_of(path)}
    modules -= {*sys.stdlib_module_names, "penstock", *OPTIONAL}
    distributions = importlib.metadata.packages_distributions()
    assert {distributions[module][0].lower().replace("_", "-") for module in modules} == declared


# ---- the sdist


def test_the_sdist_has_every_source_and_nothing_generated(tmp_path: Path) -> None:
    # .ci/run builds and installs it.
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    assert archive.name == f"penstock-{penstock.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    sources = {
        str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*") if is_source(path)
    }
    made = {"PKG-INFO", "setup.cfg", *(name for name in names if ".egg-info/" in name)}
    assert names - made == {*sources, *FILES}

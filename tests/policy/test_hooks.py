"""Hooks are loaded by reference; what is wrong with one is said at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from penstock.loading import HookError, load_object
from penstock.policy.hooks import load_hook

GOOD = """
class Policy:
    def __init__(self, word="x"):
        self.word = word
    async def on_rcpt(self, transaction, recipient):
        return None

policy = Policy("object")

def make(word):
    return Policy(word)
"""


def write(folder: Path, text: str) -> str:
    file = folder / "hooks.py"
    file.write_text(text)
    return str(file)


def test_objects_classes_and_functions_are_policies(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    assert load_hook(f"{file}:policy").word == "object"  # type: ignore[attr-defined]  # a Policy
    assert load_hook(f"{file}:Policy", {"word": "y"}).word == "y"  # type: ignore[attr-defined]  # a Policy
    assert load_hook(f"{file}:make", {"word": "z"}).word == "z"  # type: ignore[attr-defined]  # a Policy


def test_a_module_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policies_for_the_test.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_hook("my_policies_for_the_test:policy")


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (GOOD, "missing", "does not define missing"),
        (GOOD, "make", "creating the object failed: TypeError"),
        ("thing = 1", "thing", "the policy has no hook; available: on_connect"),
        ("1/0", "x", "loading the module failed: ZeroDivisionError"),
        (
            "class P:\n def on_rcptt(self, a, b): ...",
            "P",
            r"unknown hook on_rcptt \(did you mean on_rcpt\?\); available",
        ),
        ("class P:\n def on_rcpt(self, a): ...", "P", "on_rcpt must take 2 arguments"),
        ("class P:\n on_mail = 1", "P", "on_mail must take 3 arguments"),
        ("async def make(): ...", "make", "must be a plain def, not async def"),
        ("class P:\n def on_message(self, a, b, c): ...", "P", "on_message must take 2 arguments"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, name: str, expected: str) -> None:
    with pytest.raises(match=expected):
        load_hook(f"{write(tmp_path, text)}:{name}")


@pytest.mark.parametrize("reference", ["", "module", ":name", "module:", "module:a b"])
def test_a_reference_has_its_form(reference: str) -> None:
    with pytest.raises(match=r"package\.module:name"):
        load_hook(reference)


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Policy:
    word: str = "WORD"
    def on_helo(self, transaction, name): ...
"""


def test_a_file_may_use_what_looks_its_module_up(tmp_path: Path) -> None:
    policy = load_hook(f"{write(tmp_path, DATACLASS)}:Policy")
    assert vars(sys.modules[type(policy).__module__])["Policy"] is type(policy)


def test_a_file_may_import_modules_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "words_of_the_hook.py").write_text("TEXT = 'beside'\n")
    (tmp_path / "hook.py").write_text("from words_of_the_hook import TEXT\nclass Policy:\n    text = TEXT\n")
    assert vars(type(load_object(f"{tmp_path}/hook.py:Policy")))["text"] == "beside"


def test_a_link_to_a_file_of_any_name_is_a_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "0abc-hook").write_text("class Policy:\n    file = __file__\n")
    (tmp_path / "hook.py").symlink_to("store/0abc-hook")
    assert vars(type(load_object(f"{tmp_path}/hook.py:Policy")))["file"] == f"{tmp_path}/hook.py"


def test_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    words = []
    for word in ("one", "two"):
        (tmp_path / word).mkdir()
        words.append(load_hook(f"{write(tmp_path / word, DATACLASS.replace('WORD', word))}:Policy"))
    assert [vars(sys.modules[type(policy).__module__])["Policy"] for policy in words] == list(map(type, words))
    assert [policy.word for policy in words] == ["one", "two"]  # type: ignore[attr-defined]  # both are a Policy


def test_a_file_that_does_not_load_leaves_the_one_before(tmp_path: Path) -> None:
    known = set(sys.modules)
    with pytest.raises(HookError):
        load_hook(f"{write(tmp_path, '1/0')}:Policy")
    assert not [name for name in set(sys.modules) - known if name.startswith("penstock_hook")]
    policy = load_hook(f"{write(tmp_path, DATACLASS)}:Policy")
    with pytest.raises(HookError):
        load_hook(f"{write(tmp_path, '1/0')}:Policy")
    assert vars(sys.modules[type(policy).__module__])["Policy"] is type(policy)


def test_compiled_code_need_not_tell_its_arguments(tmp_path: Path) -> None:
    assert load_hook(f"{write(tmp_path, 'class P:' + chr(10) + ' on_helo = dict')}:P")


def test_an_object_takes_no_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only allowed for a class"):
        load_hook(f"{write(tmp_path, GOOD)}:policy", {"word": "x"})

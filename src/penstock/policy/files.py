"""The files that the `[policy]` tables name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from penstock.policy.senderlogin import read_senders
from penstock.policy.settings import PolicySettings
from penstock.policy.signing import read_signer


def files_of(policy: PolicySettings | None, data_dir: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the keys that name files, and a function that reads each. It raises OSError or ValueError."""
    if policy is None:
        return
    if policy.sender_login is not None and policy.sender_login.file:
        yield "policy.sender_login.file", partial(read_senders, data_dir / policy.sender_login.file)
    for number, sign in enumerate(policy.sign):
        yield f"policy.sign[{number}].key", partial(read_signer, sign, data_dir)

"""Penstock: an SMTP server on trio with a compiled hot path.

The way of a message through the packages, which is the order to read them in:

The command line (`cli`) reads a TOML file into frozen settings (`config`, with the rules of the file format in
`schema`). `assembly` makes the parts that they ask for, and `app` is the only place where these are put together,
started and stopped; `loading` finds the policies and deliveries that the configuration names by "module:name".
`supervisor` runs workers, each a process of its own, which may be another user with fewer `privileges`; `control` is
what operators can do with them, and `operations` how they do it: /metrics and the control socket. `testing` runs the
same server inside a test, and `pytest_plugin` turns it into fixtures.

A client connects to a socket of `net`: the poller, streams, TLS, listeners, the PROXY protocol, DNS look-ups and
outgoing connections. Its session is one task of `server`: read server/connection.py first, it follows a connection from
the greeting to the close. The octets go through `smtp`, the protocol without any I/O: octets in, events out, replies
back (`reply`). What the client has said so far is its `transaction`; what it sends is a `message`. Compiled code, in
ext/ and in the .py files with a .pxd beside them, answers what needs no decision and counts it in `metrics`.

What needs a decision is asked of `auth` (who is this client?) and `policy` (is this mail wanted?). `mailauth` evaluates
SPF, DKIM, DMARC and ARC without any I/O, and `dns` answers its questions. What was found are the `results` of the
transaction; `penstock judge` shows them. `state` has the rate limits and the greylist, which all workers share.

A complete message goes to a `delivery`, and the client gets its 250 after that has committed it: to a Maildir, to the
`spool`, a durable queue, to the same queue replicated over several machines (`cluster`), or straight to the next hop.
From the queue, `relay` sends it on to the next hop, tries again later, and reports to the sender when it gives up.
Everything that happens to mail is an event of the `journal`, which compiled code (`_journal`) encodes. What was found
about the mail and the TLS of a domain in a day is sent to its owner in `reports`.

`sink` is the target of load tests: it accepts everything, injects faults on request and keeps statistics. `load`
generates the load. Both number messages by the tags of `sequence`, so that missing and duplicate ones are found, and
both run several processes with `forked`.

At the bottom: `addresses` (the canonical form of domains and IP addresses), `breaker` (a circuit breaker),
`tokenbucket` (rates), `files` and `_files` (full disks, atomic writes, locks, many files at once), `batches` (a thread
for what came since it last looked).

A package imports only from packages below it; tests/test_layers.py has the order. Whatever programs that use Penstock
need can be imported from `penstock` itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from penstock.app import open_server, serve
    from penstock.config import Settings
    from penstock.delivery.base import Delivery
    from penstock.message import Body, Envelope, MailParameters, Message, Path, Recipient
    from penstock.policy.base import (
        ACCEPT,
        AuthPolicy,
        ConnectPolicy,
        DisconnectPolicy,
        HeloPolicy,
        MailPolicy,
        Mark,
        MessagePolicy,
        RcptPolicy,
        ResetPolicy,
        Verdict,
    )
    from penstock.reply import Reply
    from penstock.testing import SmtpServer
    from penstock.transaction import Peer, TlsInfo, Transaction

__version__ = "0.1.0"

__all__ = [
    "ACCEPT",
    "AuthPolicy",
    "Body",
    "ConnectPolicy",
    "Delivery",
    "DisconnectPolicy",
    "Envelope",
    "HeloPolicy",
    "MailParameters",
    "MailPolicy",
    "Mark",
    "Message",
    "MessagePolicy",
    "Path",
    "Peer",
    "RcptPolicy",
    "Recipient",
    "Reply",
    "ResetPolicy",
    "Settings",
    "SmtpServer",
    "TlsInfo",
    "Transaction",
    "Verdict",
    "__version__",
    "open_server",
    "serve",
]

_MODULES: Final = {
    "app": ("open_server", "serve"),
    "config": ("Settings",),
    "delivery.base": ("Delivery",),
    "message": ("Body", "Envelope", "MailParameters", "Message", "Path", "Recipient"),
    "policy.base": (
        "ACCEPT",
        "AuthPolicy",
        "ConnectPolicy",
        "DisconnectPolicy",
        "HeloPolicy",
        "MailPolicy",
        "Mark",
        "MessagePolicy",
        "RcptPolicy",
        "ResetPolicy",
        "Verdict",
    ),
    "reply": ("Reply",),
    "testing": ("SmtpServer",),
    "transaction": ("Peer", "TlsInfo", "Transaction"),
}
"""The public names by the module that defines them."""


def __getattr__(name: str) -> object:
    """Import a public name at its first use: pytest loads this package in every run, for the plugin."""
    for module, names in _MODULES.items():
        if name in names:
            value: object = getattr(import_module(f"penstock.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, those not yet imported among them."""
    return list(__all__)

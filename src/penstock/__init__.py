"""Penstock: an SMTP server on trio with a compiled wire.

General layout, in the order of a message's way through the house:

    cli         the command line, one file a command; pytest_plugin, the fixtures
    testing     a server in the process of a test, and its inbox
    assemble    the only file where concrete parts meet: settings in, a worker out
    config      TOML to settings; errors name the key
    sink        the load-test target: plan.py and faults.py misbehave, receipts.py counts, web/ shows
    load        the generator: plan.py, session.py, generator.py, report.py
    inbound     THE LOOP. Read inbound/connection.py first: one connection from its greeting to its end.
                server.py is a worker, listener.py what the connections of a listener share, limits.py who may come in
                and how long it may take, body.py where a body waits, trace.py the Received field.
    policy      what is thought of a client or a message: base.py is the seam, pipeline.py asks, hooks.py loads
    auth        who a client is: base.py is the seam, users.py the users file
    delivery    where a message goes: base.py is the seam; spool, maildir, passthrough and discard are the kinds
    relay       SPOOL -> NEXT HOP: scheduler.py, route.py, pool.py, conversation.py, ledger.py, backoff.py, bounce.py
    spool       DISK: store.py is the database, committer.py makes one fsync of many wishes, desk.py the operator's
    net         SOCKETS: stream.py, listen.py, connect.py, tls.py, proxyline.py, resolver.py
    smtp        THE LANGUAGE, pure: octets in, events out, replies back. server.py is the session, states.py the order
                of commands as a table, grammar.py the arguments, offer.py the EHLO keywords, sasl.py the exchanges,
                _wire (ext/wire.pyx) the octets.
    transaction what is known so far of a connection
    _histogram  latencies, counted (ext/histogram.pyx)
    journal     one method for each mail event
    message, reply   what travels, and what is said

A package imports only from those below it here; tests/test_layers.py keeps it so.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.message import Envelope, MailParameters, Message, Path, Recipient
    from penstock.policy.base import ACCEPT, Verdict
    from penstock.reply import Reply
    from penstock.transaction import Peer, TlsInfo, Transaction

__version__ = "0.1.0"

__all__ = [
    "ACCEPT",
    "Envelope",
    "MailParameters",
    "Message",
    "Path",
    "Peer",
    "Recipient",
    "Reply",
    "TlsInfo",
    "Transaction",
    "Verdict",
    "__version__",
]

_HOMES = {
    "message": ("Envelope", "Message", "Path", "Recipient"),
    "policy.base": ("ACCEPT", "Verdict"),
    "reply": ("Reply",),
    "transaction": ("MailParameters", "Peer", "TlsInfo", "Transaction"),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is asked for: pytest loads this package into every run, for its plugin."""
    for module, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(f"penstock.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")

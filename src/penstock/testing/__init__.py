r"""For tests of what sends mail: a real SMTP server in the test's own process, and its inbox.

>>> import smtplib
>>> from penstock.testing import SmtpServer

The server listens on a free port of the loopback, in a thread of its own: a test without a loop may block, and one
that runs in trio or asyncio shares nothing with it. A message is in the inbox before its sender hears 250.

>>> text = "From: alice@example.org\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\n\nHow are you?\n"
>>> with SmtpServer() as server:
...     with smtplib.SMTP(server.host, server.port) as client:
...         refused = client.sendmail("alice@example.org", ["bob@example.org", "eve@example.org"], text)
...     message = server.inbox.last
>>> message.sender, message.recipients
('alice@example.org', ('bob@example.org', 'eve@example.org'))
>>> message.subject, message.text
('Grüße', 'How are you?\n')
>>> message.email["From"].addresses[0].domain
'example.org'
>>> message.raw.startswith(b"From: alice@example.org\r\n")
True
>>> message.envelope.size == len(message.raw)
True

When another task or process sends the mail, wait for it. Nothing sleeps: the message wakes the test. `wait_async` and
`wait_for_async` do the same in trio and in asyncio.

>>> import threading
>>> def send_later(host, port):
...     with smtplib.SMTP(host, port) as client:
...         client.sendmail("shop@example.org", ["bob@example.org"], "Subject: Your order\n\nThank you.")
>>> with SmtpServer() as server:
...     sender = threading.Thread(target=send_later, args=(server.host, server.port))
...     sender.start()
...     message = server.inbox.wait_for(recipient="bob@example.org", subject="order", timeout=10)
...     sender.join()
>>> message.text
'Thank you.\n'

TLS has a certificate for localhost, 127.0.0.1 and ::1, by an authority of its own that clients can check it with.

>>> with SmtpServer(tls="starttls", users={"alice": "secret"}, require_auth=True) as server:
...     with smtplib.SMTP("localhost", server.port) as client:
...         status, _ = client.starttls(context=server.ssl_context())
...         status, _ = client.login("alice", "secret")
...         refused = client.sendmail("alice@example.org", ["bob@example.org"], "Subject: Safe\n\nHello")
>>> server.inbox.last.tls.version, server.inbox.last.identity, server.inbox.last.protocol
('TLSv1.3', 'alice', 'ESMTPSA')

What a client does wrong, it hears, and the dialog tells. Passwords are not in it.

>>> with SmtpServer(users={"alice": "secret"}, require_auth=True) as server:
...     with smtplib.SMTP("localhost", server.port, local_hostname="client.example.org") as client:
...         client.sendmail("alice@example.org", ["bob@example.org"], "Subject: Stranger\n\nHello")
Traceback (most recent call last):
smtplib.SMTPSenderRefused: (530, b'5.7.0 Authentication required', 'alice@example.org')
>>> print(*server.dialog.lines()[-7:-3], sep="\n")
#1 C: MAIL ...:<alice@example.org> size=26
#1 S: 530 5.7.0 Authentication required
#1 C: RSET
#1 S: 250 2.0.0 Reset

Senders have to live with servers that are full, slow or gone. `fail_next` gives the next command (here the dot at the
end of the text) a reply of your choice; `faults` takes a whole plan, with everything that `penstock sink` can do wrong.

>>> with SmtpServer() as server:
...     server.fail_next(".", 451, status="4.3.0", text="Not now")
...     with smtplib.SMTP(server.host, server.port) as client:
...         for attempt in range(3):
...             try:
...                 refused = client.sendmail("alice@example.org", ["bob@example.org"], "Subject: Patience")
...             except smtplib.SMTPDataError as exc:
...                 print(exc.smtp_code, exc.smtp_error.decode())
...             else:
...                 break
451 4.3.0 Not now
>>> attempt, len(server.inbox), server.applied_faults[0].action
(1, 1, 'reply 451 4.3.0')

The policies that a Penstock server has in Python are tested in the same way: `SmtpServer(policies=[MyPolicy()])`.

For pytest there are fixtures: see penstock.pytest_plugin.
"""

from __future__ import annotations

from penstock.sink.faults import AppliedFault
from penstock.sink.plan import PlanError
from penstock.testing.dialog import Dialog
from penstock.testing.helpers import Authority
from penstock.testing.inbox import Inbox, ReceivedMessage
from penstock.testing.server import SmtpServer

__all__ = ["AppliedFault", "Authority", "Dialog", "Inbox", "PlanError", "ReceivedMessage", "SmtpServer"]

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

When the mail is sent by somebody else (a task, a queue, another process), wait for it. Nothing sleeps: the message
wakes the test. `wait_async` and `wait_for_async` do the same in trio and in asyncio.

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
#1 C: MAIL FROM:<alice@example.org> size=26
#1 S: 530 5.7.0 Authentication required
#1 C: RSET
#1 S: 250 2.0.0 Reset

The policies that a Penstock server has in Python are tested in the same way: `SmtpServer(policies=[MyPolicy()])`.

For pytest there are fixtures: see penstock.pytest_plugin.
"""

from __future__ import annotations

from penstock.testing.dialog import Dialog
from penstock.testing.inbox import Inbox, ReceivedMessage
from penstock.testing.server import Authority, SmtpServer

__all__ = ["Authority", "Dialog", "Inbox", "ReceivedMessage", "SmtpServer"]

"""The plain form of the arguments of EHLO, MAIL and RCPT. The source is ext/grammar.pyx."""

from typing import Final

from penstock.message import Recipient
from penstock.reply import Reply
from penstock.smtp.events import Mail

BAD_SENDER: Final[Reply]
BAD_RECIPIENT: Final[Reply]

def plain_mail(argument: bytes, esmtp: bool, eightbitmime: bool, max_size: int) -> Mail | Reply | None:
    """Read a plain `FROM:<dot-string@domain> SIZE=n BODY=...`; return None when the argument is not plain."""

def plain_recipient(argument: bytes) -> Recipient | None:
    """Read a plain `TO:<dot-string@domain>`; return None when the argument is not plain."""

def plain_hello(argument: bytes) -> str | None:
    """Return the argument of EHLO when it is one short word of printable ASCII, else None."""

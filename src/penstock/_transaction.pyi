"""What the compiled part of a transaction shows."""

from penstock.message import MailParameters, Path, Recipient
from penstock.transaction import Peer, TlsInfo

class TransactionCore:
    """The fields of a transaction."""

    peer: Peer
    listener: str
    """The name of the listener that accepted the connection."""
    hello: str
    """The argument of HELO, EHLO or LHLO; "" before it."""
    is_esmtp: bool
    """The client said EHLO or LHLO."""
    is_lmtp: bool
    tls: TlsInfo | None
    identity: str | None
    """The authenticated user name."""
    sender: Path | None
    """The reverse-path once MAIL was accepted; None outside of a transaction."""
    parameters: MailParameters
    recipients: list[Recipient]
    @property
    def findings(self) -> dict[str, object]:
        """What checks and hooks want the later ones to know; forgotten with the transaction."""
    def __init__(
        self,
        peer: Peer,
        listener: str = "",
        *,
        hello: str = "",
        is_esmtp: bool = False,
        is_lmtp: bool = False,
        tls: TlsInfo | None = None,
        identity: str | None = None,
    ) -> None:
        """Begin with a connection."""
    def reset(self) -> None:
        """Forget the mail transaction, keep the connection (RFC 5321 4.1.1.5)."""

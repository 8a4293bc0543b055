"""The fields of a transaction, which each command of the commonest path reads or writes. See penstock.transaction."""

from penstock.message import NO_PARAMETERS

cdef object no_parameters = NO_PARAMETERS


cdef class TransactionCore:
    """What `penstock.transaction.Transaction` is made of."""

    def __init__(
        self, peer, str listener="", *, str hello="", bint is_esmtp=False, bint is_lmtp=False, tls=None, identity=None
    ):
        self.peer = peer
        self.listener = listener
        self.hello = hello
        self.is_esmtp = is_esmtp
        self.is_lmtp = is_lmtp
        self.tls = tls
        self.identity = identity
        self.parameters = no_parameters
        self.recipients = []

    @property
    def findings(self):
        if self._findings is None:  # as in most transactions
            self._findings = {}
        return self._findings

    def reset(self):
        self.forget()

    cdef int forget(self) except -1:
        self.sender = None
        self.parameters = no_parameters
        if self.recipients:
            self.recipients = []
        self._findings = None
        return 0

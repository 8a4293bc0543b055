"""The authenticator of a sink: every name and every password is right."""

from __future__ import annotations

from penstock.smtp.sasl import ScramKeys


class AcceptAllAuthenticator:
    """Lets everybody in; see penstock.auth.base. For PLAIN and LOGIN: SCRAM needs to know a password beforehand."""

    async def verify(self, name: str, password: str) -> bool:  # noqa: ARG002 - the seam has them
        """Say yes."""
        return True

    def scram_keys(self, name: str) -> ScramKeys:
        """Raise NotImplementedError: the mechanism is not offered."""
        raise NotImplementedError(f"SCRAM is not offered to anybody, so not to {name!r}")

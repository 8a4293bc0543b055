"""Requests on the control socket that no command of ours would send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio

from penstock.config import Settings
from penstock.operations.controlsocket import ControlSocket, bind_control
from penstock.operations.observation import Observation


class Control:
    """Notes what it is asked to do."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def drain(self, **arguments: Any) -> None:
        self.asked.append(arguments)


async def test_wrong_requests_are_refused_and_change_nothing(tmp_path: Path) -> None:
    requests: list[tuple[str, dict[str, Any], str]] = [
        ("nothing", {}, "unknown request 'nothing'; there are state, metrics"),
        ("state", {"x": 1}, "unexpected keyword argument"),
        ("drain", {"delay": "soon"}, "delay: expected 0 to 604800 seconds, not 'soon'"),
        ("drain", {"delay": -5}, "delay: expected 0 to"),
        ("drain", {"most": 1e300}, "most: expected 0 to"),
        ("hop", {"hop": 5, "action": "retry"}, "hop: expected a name"),
        ("hop", {"hop": "x" * 400, "action": "retry"}, "hop: expected a name"),
        ("hop", {"hop": "x", "action": "delete"}, "unknown action 'delete'"),
    ]
    control, path = Control(), tmp_path / "control"
    server = ControlSocket(control, Observation(Settings(data_dir=str(tmp_path))))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, bind_control(path))
        stream = await trio.open_unix_socket(str(path))
        async with stream:
            received = b""
            for number, (verb, arguments, expected) in enumerate(requests, 1):
                line = json.dumps({"verb": verb, "number": number, "arguments": arguments})
                await stream.send_all(line.encode() + b"\n")
                while b"\n" not in received:
                    received += await stream.receive_some(4096)
                answer, _, received = received.partition(b"\n")
                assert expected in json.loads(answer)["error"]
            assert control.asked == []
            await stream.send_all(b'{"verb":"drain","number":9,"arguments":{"delay":0,"stay":true}}\n')
            assert b'"number":9' in await stream.receive_some(4096)
            assert control.asked == [{"delay": 0, "timeout": 600.0, "stay": True}]
        nursery.cancel_scope.cancel()
    assert not path.exists()

"""Describes the cluster for an operator."""

from __future__ import annotations

from typing import NamedTuple

from penstock.cluster.control import read_control
from penstock.cluster.jetstream import JetStream
from penstock.cluster.layout import Layout
from penstock.cluster.leases import Lease, NodeState, read_leases, read_nodes
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.setup import make_layout
from penstock.net.nats import NatsError


async def describe(jetstream: JetStream, settings: JetStreamSettings) -> list[str]:
    """Return lines. Raise NatsError if JetStream does not answer."""
    layout = make_layout(settings)
    lines = []
    for number in range(settings.streams):
        name = layout.stream(number)
        try:
            info = await jetstream.api(f"STREAM.INFO.{name}", {"subjects_filter": f"{layout.name}.m.>"})
        except NatsError as exc:
            lines.append(f"{name}: {exc}")
            continue
        state, group = info["state"], info.get("cluster") or {}
        used = state["bytes"] / max(1, info["config"]["max_bytes"])
        lines.append(
            f"{name}: {state['messages']:,} entries of {state['bytes']:,} octets ({used:.0%} of its size), leader "
            f"{group.get('leader', 'none')}"
        )
        lines += [
            f"    {each['name']}: {'up to date' if each.get('current') else 'behind'}"
            for each in group.get("replicas") or []
        ]
    found = await owners(jetstream, layout)
    lines += found.lines
    if found.free:
        lines.append(f"{found.free} of {layout.partitions} partitions have no node")
    control = await read_control(jetstream, layout)
    if control.suspended:
        lines.append(f"suspended: {', '.join(control.suspended)}")
    return lines


class Owners(NamedTuple):
    """Which node relays what."""

    lines: list[str]
    """One for each node."""
    free: int
    """Partitions that no living node relays."""
    spooled: dict[str, int]
    """Messages in the local spools that wait for the cluster, by node; only where there are some."""


async def owners(jetstream: JetStream, layout: Layout) -> Owners:
    """Return the living nodes with their leases. Raise NatsError."""
    nodes = await read_nodes(jetstream, layout)
    leases = await read_leases(jetstream, layout)
    lines = [_node_line(name, state, leases) for name, state in sorted(nodes.items())]
    free = layout.partitions - sum(each.node in nodes for each in leases.values())
    return Owners(lines, free, {name: state.spooled for name, state in nodes.items() if state.spooled})


async def lease_problems(jetstream: JetStream, layout: Layout) -> tuple[list[str], list[str]]:
    """Return a line for each living node, and one for each thing that is wrong with what they relay."""
    try:
        found = await owners(jetstream, layout)
    except NatsError as exc:
        return [], [f"leases cannot be read: {exc}"]
    problems = []
    if found.lines and found.free:
        problems.append(f"{found.free} of {layout.partitions} partitions are relayed by no node")
    problems += [
        f"node {name}: {count:,} messages in its local spool wait for the cluster"
        for name, count in sorted(found.spooled.items())
    ]
    return found.lines, problems


def _node_line(name: str, state: NodeState, leases: dict[int, Lease]) -> str:
    owned = sum(lease.node == name for lease in leases.values())
    drains = ", draining" if state.is_draining else ""
    spooled = f", {state.spooled:,} messages in its local spool" if state.spooled else ""
    return f"node {name}: version {state.version}, {owned} partitions{drains}{spooled}"

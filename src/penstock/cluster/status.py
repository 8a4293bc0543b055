"""Describes the cluster for an operator."""

from __future__ import annotations

from penstock.cluster.jetstream import JetStream
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
    nodes = await read_nodes(jetstream, layout)
    leases = await read_leases(jetstream, layout)
    lines += [_node_line(name, state, leases) for name, state in sorted(nodes.items())]
    free = layout.partitions - sum(each.node in nodes for each in leases.values())
    if free:
        lines.append(f"{free} of {layout.partitions} partitions have no node")
    return lines


def _node_line(name: str, state: NodeState, leases: dict[int, Lease]) -> str:
    owned = sum(lease.node == name for lease in leases.values())
    drains = ", draining" if state.is_draining else ""
    return f"node {name}: version {state.version}, {owned} partitions{drains}"

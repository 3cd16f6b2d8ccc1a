"""The overlay: which nodes exist, which are online, which are offered for a segment."""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from network.identity import Certificate, PeerAddress
from network.ids import NodeID, PublicKey
from network.limits import NODE_ONLINE_S
from network.messages import CheckInRequest, NodeReport
from satellite.db.database import DbRow, Transaction


@dataclass(frozen=True, slots=True)
class KnownNode:
    """A node as selection sees it."""

    number: int
    node_id: NodeID
    public_key: PublicKey
    host: str
    port: int
    failure_domain: str
    free_bytes: int
    last_check_in_s: int

    @property
    def address(self) -> PeerAddress:
        """Where to dial it."""
        return PeerAddress(self.node_id, self.host, self.port)

    def is_online(self, now_s: int) -> bool:
        """Whether it has checked in lately."""
        return now_s - self.last_check_in_s < NODE_ONLINE_S


def failure_domain(host: str) -> str:
    """The /24 (IPv4) or /64 (IPv6) of an address; a name is its own domain."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    prefix = 24 if address.version == 4 else 64
    return str(ipaddress.ip_network(f"{address}/{prefix}", strict=False))


_COLUMNS = (
    "node_number, node_id, public_key, host, port, failure_domain,"
    " capacity_bytes - stored_bytes, last_check_in_s"
)


def _node(row: DbRow) -> KnownNode:
    number, node_id, key, host, port, domain, free, last = row
    assert isinstance(node_id, bytes)
    assert isinstance(key, bytes)
    return KnownNode(
        int(number), NodeID(node_id), PublicKey(key), str(host), int(port), str(domain),
        int(free), int(last),
    )  # fmt: skip


def check_in(
    tx: Transaction, certificate: Certificate, request: CheckInRequest, now_s: int
) -> None:
    """Note a node's address and space; a node seen for the first time is registered."""
    number = tx.number("SELECT node_number FROM node WHERE node_id=?", (certificate.node_id,))
    domain = failure_domain(request.host)
    if number:
        tx.execute(
            "UPDATE node SET host=?, port=?, failure_domain=?, capacity_bytes=?, stored_bytes=?,"
            " version=?, last_check_in_s=? WHERE node_number=?",
            (
                request.host, request.port, domain, request.capacity_bytes,
                request.stored_bytes, request.version, now_s, number,
            ),
        )  # fmt: skip
        return
    number = tx.number("SELECT coalesce(max(node_number), 0) + 1 FROM node")
    tx.execute(
        "INSERT INTO node VALUES (?,?,?,?,?,?,?,?,0,?,?,?)",
        (
            number, certificate.node_id, certificate.public_key, request.host, request.port,
            domain, request.capacity_bytes, request.stored_bytes, request.version, now_s, now_s,
        ),
    )  # fmt: skip


def all_nodes(tx: Transaction) -> list[KnownNode]:
    """Every node ever seen."""
    return [_node(row) for row in tx.all(f"SELECT {_COLUMNS} FROM node ORDER BY node_number")]


def reports(tx: Transaction, now_s: int) -> list[NodeReport]:
    """Every node for the status command."""
    rows = tx.all(
        "SELECT node_id, host, port, last_check_in_s, capacity_bytes, stored_bytes, bad_shares,"
        " (SELECT count(*) FROM piece WHERE piece.node_number=node.node_number)"
        " FROM node ORDER BY node_number"
    )
    found = []
    for node_id, host, port, last, capacity, stored, bad, pieces in rows:
        assert isinstance(node_id, bytes)
        found.append(
            NodeReport(
                NodeID(node_id), str(host), int(port), now_s - int(last) < NODE_ONLINE_S,
                int(last), int(capacity), int(stored), int(pieces), int(bad),
            )
        )  # fmt: skip
    return found


def select(
    nodes: Sequence[KnownNode],
    *,
    count: int,
    piece_bytes: int,
    avoid: frozenset[NodeID],
    now_s: int,
    shuffle: Callable[[list[KnownNode]], None],
) -> list[KnownNode]:
    """Choose up to `count` online nodes with room, one per failure domain, in random order.

    Nodes to avoid come last, and only when the others do not suffice. Pure but for `shuffle`.
    """
    usable = [node for node in nodes if node.is_online(now_s) and node.free_bytes > piece_bytes]
    shuffle(usable)
    usable.sort(key=lambda node: node.node_id in avoid)
    chosen: list[KnownNode] = []
    domains: set[str] = set()
    for node in usable:
        if node.failure_domain not in domains:
            domains.add(node.failure_domain)
            chosen.append(node)
        if len(chosen) == count:
            break
    return chosen

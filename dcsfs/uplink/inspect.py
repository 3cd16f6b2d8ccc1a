"""Describe a file's extents, segments and nodes, for `dcsfs stat`."""

from collections.abc import Mapping, Sequence
from typing import Any

from dcsfs.uplink.client import INLINE_SEGMENT, BucketClient
from network import messages as m
from network.extentmap import Row
from network.ids import ExtentID
from network.limits import LOCATE_SEGMENTS_MAX


async def describe_placement(
    client: BucketClient, rows: Sequence[Row], placements: Mapping[ExtentID, m.Placement]
) -> dict[str, Any]:
    """`extents` in file order, and `segments` (the first 64) with the node of each piece."""
    extents = [
        {
            "file_offset": row.file_offset,
            "length": row.length,
            "extent": row.extent_id.hex(),
            "segment": placements[row.extent_id].segment_id.hex(),
            "segment_offset": placements[row.extent_id].offset,
        }
        for row in rows
    ]
    used = dict.fromkeys(placements[row.extent_id].segment_id for row in rows)
    wanted = tuple(item for item in used if item != INLINE_SEGMENT)[:LOCATE_SEGMENTS_MAX]
    reply = await client.call(
        m.OPEN_SEGMENTS, m.OpenSegmentsRequest(client.api_key, client.bucket, wanted)
    )
    return {
        "extents": extents,
        "segments": {item.segment_id.hex(): _describe(item) for item in reply.segments},
    }


def _describe(grant: m.SegmentGrant) -> dict[str, Any]:
    scheme = grant.scheme
    return {
        "size": grant.size,
        "root": grant.root.hex(),
        "redundancy": f"{scheme.required}/{scheme.repair}/{scheme.success}/{scheme.total}",
        "pieces": {
            str(item.index): {
                "node": str(item.limit.node_id),
                "address": f"{item.address.host}:{item.address.port}",
            }
            for item in grant.grants
        },
    }

"""Every cap in the system, with its reason. Units are the last word of each name."""

from network.units import KiB, MiB

# Framing
FRAME_HEADER_BYTES_MAX = 24 * MiB  # an `apply` of 16,384 operations with their seals
FRAME_HEADER_BYTES_NODE = 64 * KiB  # nodes take no batches: strangers cannot make them allocate
FRAME_BODY_BYTES_MAX = 1 * MiB  # piece data travels in runs of at most PIECE_FRAME_SHARES shares
PUT_FRAME_SHARES = 4  # 262,208 bytes: what 160 uploads at once may hold in buffers
GET_FRAME_SHARES = 8  # 524,416 bytes: half the frames, and a read has at most 58 connections
ERROR_TEXT_BYTES_MAX = 2 * KiB

# Deadlines
HANDSHAKE_DEADLINE_S = 10.0
RPC_DEADLINE_S = 10.0
APPLY_DEADLINE_S = 30.0  # one transaction of up to APPLY_OPERATIONS_MAX operations
CONNECT_DEADLINE_S = 4.0
IDLE_CONNECTION_S = 300.0  # a server closes a silent connection after this
POOL_IDLE_S = 120.0  # a client drops its own well before that
UNCACHED_READ_DEADLINE_S = 30.0
PIECE_PROGRESS_DEADLINE_S = 10.0  # one frame of one piece, either direction
DEGRADED_COMMIT_AFTER_S = 10.0  # without progress, at or above the durability line
CACHE_SPACE_DEADLINE_S = 60.0
STAGE_INTERVAL_S = 1.0
FLUSH_INTERVAL_S = 60.0
UMOUNT_PROGRESS_DEADLINE_S = 60.0
SESSION_LIFE_S = 60.0
SESSION_RENEW_S = 15.0
RECALL_DEADLINE_S = 10.0  # a lease that is not given back by then is taken
OPEN_SESSION_DEADLINE_S = RECALL_DEADLINE_S + 5.0
PING_INTERVAL_S = 1.0
TRUST_S = 3.0  # how long after a ping was sent its answer vouches for what is cached
ACKNOWLEDGE_DEADLINE_S = 5.0  # a session that takes longer to take in a change is cut off
CHANNEL_LIFE_S = 30 * 24 * 3600.0
CHANNEL_QUEUE_FRAMES_MAX = 4096
CLOSE_COMMIT_DEADLINE_S = 30.0  # a shared mount's close waits so long for the network
ORDER_LIMIT_LIFE_S = 24 * 3600
SEGMENT_GRACE_S = 2 * ORDER_LIMIT_LIFE_S  # garbage is kept longer than any order limit lives
CLOCK_SKEW_S = 3600
CHECK_IN_INTERVAL_S = 30.0
NODE_ONLINE_S = 100.0  # three missed check-ins

# Segments, shares, extents
RECORD_PLAINTEXT_BYTES = 64 * KiB
TAG_BYTES = 16
RECORD_BYTES = RECORD_PLAINTEXT_BYTES + TAG_BYTES  # 65,552: also the size of a full erasure share
STRIPES_MAX = 35
EXTENT_PLAINTEXT_BYTES_MAX = 8 * MiB
MAP_WINDOW_BYTES = 64 * MiB
MAP_ROWS_PER_MIB_MAX = 16
ORDER_STEP_BYTES = 4 * MiB

# Names and metadata
NAME_BYTES_MAX = 255
ENCRYPTED_NAME_BYTES_MAX = 1024
SYMLINK_BYTES_MAX = 4096
XATTR_VALUE_BYTES_MAX = 64 * KiB
XATTRS_PER_INODE_MAX = 256
FILE_BYTES_MAX = 2**62
INTEGER_MIN, INTEGER_MAX = -(2**63), 2**63 - 1  # what the columns behind the messages store
TIME_NS_MIN, TIME_NS_MAX = INTEGER_MIN, INTEGER_MAX  # from 1677 to 2262

# Batches
APPLY_OPERATIONS_MAX = 16384
LIST_PAGE_ENTRIES_MAX = 4096
MAP_PAGE_ROWS_MAX = 16384
PATH_PAGE_ENTRIES_MAX = 64  # levels of the tree in one answer to FIND_PATH
PATH_LEVELS_MAX = 4096  # Linux takes no longer path; deeper is a satellite that leads in circles
LOCATE_SEGMENTS_MAX = 64
INODE_GRANT_COUNT = 1 << 36  # years of creating for one mount, and a hundred million mounts
ORPHANS_ASKED_MAX = 4096
ORPHAN_INTERVAL_S = 10.0  # how often sessions are asked which inodes without names they hold

# Peers
CONNECTIONS_PER_SERVER_MAX = 4096
POOLED_PER_ADDRESS_MAX = 16
MACAROON_CAVEATS_MAX = 64
MACAROON_BYTES_MAX = 16 * KiB
PIECES_PER_SEGMENT_MAX = 256  # the field is GF(2^8)

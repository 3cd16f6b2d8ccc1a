-- The canonical schema. Types and statements are those SQLite and PostgreSQL share; blobs are
-- opaque to the satellite unless a comment says what is in them.

-- A customer. The salt goes into every passphrase derivation of the project.
CREATE TABLE project (
    project_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    salt BLOB NOT NULL,              -- 16 random bytes
    quota_bytes BIGINT NOT NULL,     -- 0: none
    created_ns BIGINT NOT NULL
);

-- Root secrets of API keys; everything derived from one by caveats verifies against it.
CREATE TABLE api_key (
    head BLOB PRIMARY KEY,           -- 32 random bytes, the macaroon's public head
    project_id INTEGER NOT NULL REFERENCES project,
    secret BLOB NOT NULL,            -- 32 random bytes
    name TEXT NOT NULL,
    created_ns BIGINT NOT NULL,
    revoked INTEGER NOT NULL         -- 1: refused
);

-- One file system tree. The name is visible, nothing below it is.
CREATE TABLE bucket (
    bucket_id INTEGER PRIMARY KEY,
    public_id BLOB NOT NULL UNIQUE,  -- 16 bytes drawn by the client, bound into every seal
    project_id INTEGER NOT NULL REFERENCES project,
    name TEXT NOT NULL,
    wrapped_root_key BLOB NOT NULL,
    root_inode BIGINT NOT NULL,
    next_number BIGINT NOT NULL,     -- first inode or dentry number not granted to a session yet
    transactions BIGINT NOT NULL,    -- batches applied
    created_ns BIGINT NOT NULL,
    UNIQUE (project_id, name)
);

-- Read-write sessions, one row per cache directory; at most one row per bucket is active.
CREATE TABLE session (
    session_id BLOB PRIMARY KEY,     -- 16 bytes
    bucket_id INTEGER NOT NULL REFERENCES bucket,
    cache_id BLOB NOT NULL,          -- 16 bytes: names the client's cache directory
    host TEXT NOT NULL,              -- for the sentence that refuses a second writer
    pid INTEGER NOT NULL,
    expires_s BIGINT NOT NULL,       -- 0: not active
    last_sequence BIGINT NOT NULL,   -- last batch applied, kept in that batch's transaction
    last_chain BLOB NOT NULL,        -- hash chain of the client's log at that batch
    last_result BLOB NOT NULL,       -- packed ApplyResponse of that batch
    UNIQUE (bucket_id, cache_id)
);

-- What POSIX needs in the clear. nlink 0: unlinked but open; reaped when the session says so.
CREATE TABLE inode (
    bucket_id INTEGER NOT NULL,
    inode BIGINT NOT NULL,           -- granted to a session, never reused
    generation BIGINT NOT NULL,
    kind INTEGER NOT NULL,           -- messages.Kind
    rdev BIGINT NOT NULL,
    nlink BIGINT NOT NULL,
    size BIGINT NOT NULL,
    allocated BIGINT NOT NULL,       -- bytes that are not holes
    content_version BIGINT NOT NULL, -- plus one per CommitContent
    mode INTEGER NOT NULL,           -- permission bits
    uid BIGINT NOT NULL,
    gid BIGINT NOT NULL,
    atime_ns BIGINT NOT NULL,
    mtime_ns BIGINT NOT NULL,
    ctime_ns BIGINT NOT NULL,
    symlink BLOB NOT NULL,           -- encrypted target
    seal BLOB NOT NULL,              -- the client's authenticator over the row and the map
    PRIMARY KEY (bucket_id, inode)
);

-- Names. A rename is one row; a hard link is a second row.
CREATE TABLE dentry (
    bucket_id INTEGER NOT NULL,
    parent BIGINT NOT NULL,
    name BLOB NOT NULL,              -- AES-SIV under the directory's name key
    dentry_id BIGINT NOT NULL,       -- permanent; listing order and readdir cookie
    child BIGINT NOT NULL,
    wrapped_key BLOB NOT NULL,       -- the child's key under the parent's wrap key
    PRIMARY KEY (bucket_id, parent, name)
);
CREATE UNIQUE INDEX dentry_by_id ON dentry (bucket_id, parent, dentry_id);
CREATE INDEX dentry_by_child ON dentry (bucket_id, child);

CREATE TABLE xattr (
    bucket_id INTEGER NOT NULL,
    inode BIGINT NOT NULL,
    name BLOB NOT NULL,              -- encrypted
    value BLOB NOT NULL,             -- encrypted
    PRIMARY KEY (bucket_id, inode, name)
);

-- Extent maps: network.extentmap.Row. What no row covers is a hole.
CREATE TABLE extent_row (
    bucket_id INTEGER NOT NULL,
    inode BIGINT NOT NULL,
    file_offset BIGINT NOT NULL,
    length BIGINT NOT NULL,
    extent_id BLOB NOT NULL,
    extent_offset BIGINT NOT NULL,   -- where the run begins inside the extent
    key_version INTEGER NOT NULL,
    PRIMARY KEY (bucket_id, inode, file_offset)
);

-- Placement of extents. Kept at reference count 0 until the segment is collected.
CREATE TABLE extent (
    bucket_id INTEGER NOT NULL,
    extent_id BLOB NOT NULL,         -- 16 random bytes drawn by the client
    segment_id BLOB NOT NULL,        -- 16 zero bytes: inline
    segment_offset BIGINT NOT NULL,
    ciphertext_bytes BIGINT NOT NULL,
    reference_count BIGINT NOT NULL, -- rows of extent_row that name it
    PRIMARY KEY (bucket_id, extent_id)
);
CREATE INDEX extent_by_segment ON extent (bucket_id, segment_id, segment_offset);

-- Small ciphertext waiting to be packed into a segment.
CREATE TABLE inline_extent (
    bucket_id INTEGER NOT NULL,
    extent_id BLOB NOT NULL,
    ciphertext BLOB NOT NULL,
    PRIMARY KEY (bucket_id, extent_id)
);

CREATE TABLE segment (
    segment_id BLOB PRIMARY KEY,     -- 16 random bytes
    bucket_id INTEGER NOT NULL,
    state INTEGER NOT NULL,          -- 0: offered to an upload, 1: committed
    size BIGINT NOT NULL,            -- ciphertext bytes
    root BLOB NOT NULL,              -- segment root, the only content hash the satellite keeps
    required INTEGER NOT NULL,       -- the redundancy scheme at upload
    repair INTEGER NOT NULL,
    success INTEGER NOT NULL,
    total INTEGER NOT NULL,
    placement INTEGER NOT NULL,      -- placement constraint; 0: none
    expires_s BIGINT NOT NULL,       -- 0: never
    secret BLOB NOT NULL,            -- piece ids are derived from it
    live_bytes BIGINT NOT NULL,      -- ciphertext of extents with references
    created_ns BIGINT NOT NULL
);
CREATE INDEX segment_by_bucket ON segment (bucket_id, state, live_bytes);

-- Where each index of a segment is, and the node's word for it.
CREATE TABLE piece (
    segment_id BLOB NOT NULL,
    piece_index INTEGER NOT NULL,
    node_number INTEGER NOT NULL,
    receipt BLOB NOT NULL,           -- packed Receipt, verified before any penalty
    PRIMARY KEY (segment_id, piece_index)
);
CREATE INDEX piece_by_node ON piece (node_number);

CREATE TABLE node (
    node_number INTEGER PRIMARY KEY,
    node_id BLOB NOT NULL UNIQUE,    -- 32 bytes
    public_key BLOB NOT NULL,        -- Ed25519
    host TEXT NOT NULL,
    port INTEGER NOT NULL,
    failure_domain TEXT NOT NULL,    -- the address's /24 or /64
    capacity_bytes BIGINT NOT NULL,
    stored_bytes BIGINT NOT NULL,    -- as the node last said
    bad_shares BIGINT NOT NULL,      -- reports by clients
    version TEXT NOT NULL,
    first_seen_s BIGINT NOT NULL,
    last_check_in_s BIGINT NOT NULL
);

-- Clients' reports of shares that did not match the segment root, for audit to follow up.
CREATE TABLE bad_share_report (
    segment_id BLOB NOT NULL,
    piece_index INTEGER NOT NULL,
    node_number INTEGER NOT NULL,
    reported_s BIGINT NOT NULL,
    PRIMARY KEY (segment_id, piece_index, node_number)
);

-- For settlement: the highest order a node has handed in per serial.
CREATE TABLE settlement (
    serial BLOB PRIMARY KEY,
    node_number INTEGER NOT NULL,
    bucket_id INTEGER NOT NULL,
    action INTEGER NOT NULL,
    amount BIGINT NOT NULL,
    settled_s BIGINT NOT NULL
);

-- Several sessions may be active on a bucket; at most one of them holds its write lease.
ALTER TABLE session ADD COLUMN is_exclusive INTEGER NOT NULL DEFAULT 0;
                                     -- 1: keeps the lease for good, others are refused
ALTER TABLE session ADD COLUMN holds_lease INTEGER NOT NULL DEFAULT 0;
                                     -- 1: answers namespace operations from its own state
ALTER TABLE session ADD COLUMN direct_sequence BIGINT NOT NULL DEFAULT 0;
                                     -- last direct batch applied (write-through, not logged)
ALTER TABLE session ADD COLUMN direct_result BLOB;
                                     -- packed ApplyResponse of that batch
CREATE INDEX session_by_bucket ON session (bucket_id, expires_s);

-- Files with content that their session has staged and not yet sent, when its lease was recalled.
CREATE TABLE reservation (
    bucket_id INTEGER NOT NULL,
    inode BIGINT NOT NULL,
    session_id BLOB NOT NULL,
    commits BIGINT NOT NULL,         -- CommitContent still to come
    PRIMARY KEY (bucket_id, inode)
)

-- Bytes of content (extent rows, so holes are free) a bucket may hold, 0 for any number, and holds.
ALTER TABLE bucket ADD COLUMN quota_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE bucket ADD COLUMN used_bytes BIGINT NOT NULL DEFAULT 0;
UPDATE bucket SET used_bytes = (
    SELECT coalesce(sum(length), 0) FROM extent_row WHERE extent_row.bucket_id = bucket.bucket_id
);

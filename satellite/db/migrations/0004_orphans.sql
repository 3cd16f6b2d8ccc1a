-- Inodes without names are few: found without looking at the others (satellite/orphans.py).
CREATE INDEX inode_without_name ON inode (bucket_id, inode) WHERE nlink = 0;

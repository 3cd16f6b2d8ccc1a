"""Make, list and remove buckets."""

from dcsfs import keys
from dcsfs.access import AccessGrant
from dcsfs.keys import InodeKey, Sealed
from network import messages as m
from network.errors import DcsError, WrongPassphrase
from network.extentmap import EMPTY_MAP_ROOT
from network.rpc import ConnectionPool
from network.runtime import Runtime

ROOT_INODE = 1


async def create_bucket(
    runtime: Runtime, pool: ConnectionPool, grant: AccessGrant, name: str, uid: int, gid: int
) -> m.BucketInfo:
    """Make a bucket with a fresh root key, its root directory owned by (uid, gid).

    Raises AlreadyExists, InvalidArgument; WrongPassphrase when the project's other buckets do
    not open with this grant, so that no project ends up with two passphrases by mistake.
    """
    await check_passphrase(pool, grant)
    bucket_id, root_key = runtime.random_bytes(16), runtime.random_bytes(keys.KEY_BYTES)
    now = runtime.now_ns()
    attributes = m.Attributes(0o755, uid, gid, now, now, now)
    sealed = Sealed(ROOT_INODE, 1, m.Kind.DIRECTORY, attributes, 0, 0, EMPTY_MAP_ROOT)
    root = m.NewInode(
        ROOT_INODE, 1, m.Kind.DIRECTORY, 0, attributes, b"",
        InodeKey(root_key).seal(bucket_id, sealed),
    )  # fmt: skip
    wrapped = keys.wrap_root_key(grant.passphrase_key, bucket_id, root_key)
    request = m.CreateBucketRequest(grant.api_key, name, bucket_id, wrapped, root)
    return await pool.call(grant.satellite, m.CREATE_BUCKET, request)


async def list_buckets(pool: ConnectionPool, grant: AccessGrant) -> tuple[m.BucketInfo, ...]:
    """All buckets the grant may see, by name."""
    reply = await pool.call(grant.satellite, m.LIST_BUCKETS, m.ProjectRequest(grant.api_key))
    return reply.buckets


async def delete_bucket(pool: ConnectionPool, grant: AccessGrant, name: str) -> None:
    """Remove an empty bucket; raises NotEmpty, NotFound."""
    await pool.call(grant.satellite, m.DELETE_BUCKET, m.BucketRequest(grant.api_key, name))


async def check_passphrase(pool: ConnectionPool, grant: AccessGrant) -> None:
    """Raise WrongPassphrase unless the project is empty or one of its buckets opens."""
    try:
        buckets = await list_buckets(pool, grant)
    except DcsError:
        return  # a grant that may not list can still be right
    failure: WrongPassphrase | None = None
    for info in buckets[:16]:
        try:
            grant.open_bucket(info.bucket_id, info.wrapped_root_key)
        except WrongPassphrase as error:
            failure = error
        else:
            return
    if failure is not None:
        raise failure

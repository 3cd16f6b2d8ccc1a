"""Directory operations: atomic, with POSIX's rules that need more than one client's view."""

from network.errors import (
    AlreadyExists,
    InvalidArgument,
    IsADirectory,
    NotADirectory,
    NotEmpty,
    NotFound,
    PreconditionFailed,
)
from network.limits import LIST_PAGE_ENTRIES_MAX, PATH_PAGE_ENTRIES_MAX
from network.messages import (
    Create,
    EntryRecord,
    Exchange,
    Kind,
    Link,
    ListResponse,
    PathResponse,
    PathStep,
    Rename,
    Unlink,
)
from satellite.db.database import DbRow, Transaction
from satellite.metabase import inodes

_ENTRY_COLUMNS = "dentry.dentry_id, dentry.name, dentry.wrapped_key"


def _entry_from(row: DbRow) -> EntryRecord:
    dentry_id, name, wrapped = row[:3]
    assert isinstance(name, bytes)
    assert isinstance(wrapped, bytes)
    return EntryRecord(int(dentry_id), name, wrapped, inodes.record_from(row[3:]))


def _joined(condition: str, first_columns: str = _ENTRY_COLUMNS) -> str:
    columns = inodes.RECORD_COLUMNS.replace("inode, generation", "inode.inode, generation", 1)
    return (
        f"SELECT {first_columns}, {columns} FROM dentry JOIN inode"
        " ON inode.bucket_id=dentry.bucket_id AND inode.inode=dentry.child"
        f" WHERE dentry.bucket_id=? AND {condition}"
    )


_LOOKUP = _joined("dentry.parent=? AND dentry.name=?")
_LIST = _joined("dentry.parent=? AND dentry.dentry_id>? ORDER BY dentry.dentry_id LIMIT ?")
_STEP = _joined("dentry.child=? LIMIT 1", f"dentry.parent, {_ENTRY_COLUMNS}")


def lookup(tx: Transaction, bucket_id: int, parent: int, name: bytes) -> EntryRecord:
    """Find a name; raises NotFound."""
    row = tx.one(_LOOKUP, (bucket_id, parent, name))
    if row is None:
        raise NotFound("no such name")
    return _entry_from(row)


def list_page(tx: Transaction, bucket_id: int, parent: int, after: int, limit: int) -> ListResponse:
    """A page of a directory in dentry id order; raises NotFound, NotADirectory."""
    _require_directory(tx, bucket_id, parent)
    limit = max(1, min(limit, LIST_PAGE_ENTRIES_MAX))
    rows = tx.all(_LIST, (bucket_id, parent, after, limit + 1))
    return ListResponse(tuple(_entry_from(row) for row in rows[:limit]), len(rows) > limit)


def find_path(tx: Transaction, bucket_id: int, inode: int) -> PathResponse:
    """Steps from an inode up towards the root, one page; NotFound for one without a name.

    A file with several names is found by one of them. The root has no step.
    """
    inodes.get(tx, bucket_id, inode)
    steps: list[PathStep] = []
    while len(steps) < PATH_PAGE_ENTRIES_MAX:
        row = tx.one(_STEP, (bucket_id, inode))
        if row is None:
            break
        inode = int(row[0])
        steps.append(PathStep(inode, _entry_from(row[1:])))
    return PathResponse(tuple(steps))


def _require_directory(tx: Transaction, bucket_id: int, inode: int) -> None:
    if inodes.kind_of(tx, bucket_id, inode) is not Kind.DIRECTORY:
        raise NotADirectory(f"inode {inode} is not a directory")


def _child(tx: Transaction, bucket_id: int, parent: int, name: bytes) -> int | None:
    row = tx.one(
        "SELECT child FROM dentry WHERE bucket_id=? AND parent=? AND name=?",
        (bucket_id, parent, name),
    )
    return int(row[0]) if row else None


def _require_child(tx: Transaction, bucket_id: int, parent: int, name: bytes, inode: int) -> None:
    child = _child(tx, bucket_id, parent, name)
    if child is None:
        raise NotFound("no such name")
    if child != inode:
        raise PreconditionFailed(f"the name belongs to inode {child} now")


def _insert(
    tx: Transaction,
    bucket_id: int,
    parent: int,
    name: bytes,
    dentry_id: int,
    child: int,
    key: bytes,
) -> None:
    if not len(name) >= 1:
        raise InvalidArgument("a name cannot be empty")
    taken = tx.one(
        "SELECT 1 FROM dentry WHERE bucket_id=? AND parent=? AND dentry_id=?",
        (bucket_id, parent, dentry_id),
    )
    if taken:
        raise InvalidArgument(f"dentry id {dentry_id} is in use")
    tx.execute(
        "INSERT INTO dentry VALUES (?,?,?,?,?,?)",
        (bucket_id, parent, name, dentry_id, child, key),
    )


def _delete(tx: Transaction, bucket_id: int, parent: int, name: bytes) -> None:
    tx.execute(
        "DELETE FROM dentry WHERE bucket_id=? AND parent=? AND name=?", (bucket_id, parent, name)
    )


def apply_create(tx: Transaction, bucket_id: int, op: Create) -> None:
    """Create."""
    _require_directory(tx, bucket_id, op.parent)
    if _child(tx, bucket_id, op.parent, op.name) is not None:
        raise AlreadyExists("the name is taken")
    is_directory = op.inode.kind is Kind.DIRECTORY
    inodes.insert(tx, bucket_id, op.inode, 2 if is_directory else 1)
    _insert(tx, bucket_id, op.parent, op.name, op.dentry_id, op.inode.inode, op.wrapped_key)
    if is_directory:
        inodes.add_links(tx, bucket_id, op.parent, 1)


def apply_link(tx: Transaction, bucket_id: int, op: Link) -> None:
    """Link."""
    _require_directory(tx, bucket_id, op.parent)
    record = inodes.get(tx, bucket_id, op.inode)
    if record.kind is Kind.DIRECTORY:
        raise IsADirectory("a directory cannot have a second name")
    if _child(tx, bucket_id, op.parent, op.name) is not None:
        raise AlreadyExists("the name is taken")
    _insert(tx, bucket_id, op.parent, op.name, op.dentry_id, op.inode, op.wrapped_key)
    inodes.add_links(tx, bucket_id, op.inode, 1)


def apply_unlink(tx: Transaction, bucket_id: int, op: Unlink) -> None:
    """Unlink, of directories too."""
    _require_child(tx, bucket_id, op.parent, op.name, op.inode)
    _drop_name(tx, bucket_id, op.parent, op.name, op.inode)


def _drop_name(tx: Transaction, bucket_id: int, parent: int, name: bytes, inode: int) -> None:
    if inodes.kind_of(tx, bucket_id, inode) is Kind.DIRECTORY:
        entry = tx.one(
            "SELECT 1 FROM dentry WHERE bucket_id=? AND parent=? LIMIT 1", (bucket_id, inode)
        )
        if entry:
            raise NotEmpty("the directory is not empty")
        inodes.add_links(tx, bucket_id, inode, -2)
        inodes.add_links(tx, bucket_id, parent, -1)
    else:
        inodes.add_links(tx, bucket_id, inode, -1)
    _delete(tx, bucket_id, parent, name)


def _is_below(tx: Transaction, bucket_id: int, inode: int, ancestor: int) -> bool:
    """Whether `inode` is `ancestor` or lies below it; a directory has one dentry."""
    seen = 0
    while inode != ancestor:
        row = tx.one(
            "SELECT parent FROM dentry WHERE bucket_id=? AND child=? LIMIT 1", (bucket_id, inode)
        )
        seen += 1
        if row is None or seen > 4096:
            return False
        inode = int(row[0])
    return True


def apply_rename(tx: Transaction, bucket_id: int, op: Rename) -> None:
    """Rename, replacing `op.replaced` at the new name when it is not 0."""
    _require_child(tx, bucket_id, op.parent, op.name, op.inode)
    _require_directory(tx, bucket_id, op.new_parent)
    kind = inodes.kind_of(tx, bucket_id, op.inode)
    if kind is Kind.DIRECTORY and _is_below(tx, bucket_id, op.new_parent, op.inode):
        raise InvalidArgument("a directory cannot move below itself")
    there = _child(tx, bucket_id, op.new_parent, op.new_name)
    if (there or 0) != op.replaced:
        if there is not None and op.replaced == 0:
            raise AlreadyExists("the new name is taken")
        raise PreconditionFailed("the new name belongs to another inode now")
    if there is not None:
        other = inodes.kind_of(tx, bucket_id, there)
        if kind is Kind.DIRECTORY and other is not Kind.DIRECTORY:
            raise NotADirectory("a directory cannot replace a file")
        if kind is not Kind.DIRECTORY and other is Kind.DIRECTORY:
            raise IsADirectory("a file cannot replace a directory")
        _drop_name(tx, bucket_id, op.new_parent, op.new_name, there)
    _delete(tx, bucket_id, op.parent, op.name)
    _insert(tx, bucket_id, op.new_parent, op.new_name, op.dentry_id, op.inode, op.wrapped_key)
    if kind is Kind.DIRECTORY and op.parent != op.new_parent:
        inodes.add_links(tx, bucket_id, op.parent, -1)
        inodes.add_links(tx, bucket_id, op.new_parent, 1)


def apply_exchange(tx: Transaction, bucket_id: int, op: Exchange) -> None:
    """Exchange: both dentries keep their ids."""
    _require_child(tx, bucket_id, op.parent, op.name, op.inode)
    _require_child(tx, bucket_id, op.other_parent, op.other_name, op.other_inode)
    kind = inodes.kind_of(tx, bucket_id, op.inode)
    other = inodes.kind_of(tx, bucket_id, op.other_inode)
    if kind is Kind.DIRECTORY and _is_below(tx, bucket_id, op.other_parent, op.inode):
        raise InvalidArgument("a directory cannot move below itself")
    if other is Kind.DIRECTORY and _is_below(tx, bucket_id, op.parent, op.other_inode):
        raise InvalidArgument("a directory cannot move below itself")
    update = "UPDATE dentry SET child=?, wrapped_key=? WHERE bucket_id=? AND parent=? AND name=?"
    tx.execute(update, (op.other_inode, op.other_wrapped_key, bucket_id, op.parent, op.name))
    tx.execute(update, (op.inode, op.wrapped_key, bucket_id, op.other_parent, op.other_name))
    moved = (other is Kind.DIRECTORY) - (kind is Kind.DIRECTORY)
    if moved and op.parent != op.other_parent:
        inodes.add_links(tx, bucket_id, op.parent, moved)
        inodes.add_links(tx, bucket_id, op.other_parent, -moved)

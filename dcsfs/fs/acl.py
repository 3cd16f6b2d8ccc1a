"""POSIX access control lists as the kernel hands them over (acl(5)). Pure.

A value is u32 version 2, then entries of u16 tag, u16 permissions, u32 id, little-endian (Linux's
posix_acl_xattr.h). Access list and mode are two views of one thing: the mode's group bits are the
mask where there is one.
"""

import errno
import struct
from dataclasses import dataclass, replace

from dcsfs.fs.errors import FsError

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_BASE = (USER_OBJ, GROUP_OBJ, OTHER)
_HEAD = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_VERSION = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """Permissions (0 to 7) for one tag; `holder` is a uid or gid for USER and GROUP."""

    tag: int
    permissions: int
    holder: int


Acl = tuple[Entry, ...]


def parse(value: bytes) -> Acl:
    """Read a list; raises FsError(EINVAL) for one that acl_valid(3) would not accept."""
    if len(value) < _HEAD.size or (len(value) - _HEAD.size) % _ENTRY.size:
        raise FsError(errno.EINVAL)
    if _HEAD.unpack_from(value)[0] != _VERSION:
        raise FsError(errno.EINVAL)
    entries = tuple(Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEAD.size :]))
    if entries:
        _check(entries)
    return entries


def _check(entries: Acl) -> None:
    tags = [entry.tag for entry in entries]
    named = [(entry.tag, entry.holder) for entry in entries if entry.tag in (USER, GROUP)]
    good = (
        all(tag in (*_BASE, USER, GROUP, MASK) for tag in tags)
        and all(tags.count(tag) == 1 for tag in _BASE)
        and tags.count(MASK) <= 1
        and (not named or MASK in tags)
        and len(set(named)) == len(named)
        and all(entry.permissions <= 7 for entry in entries)
    )
    if not good:
        raise FsError(errno.EINVAL)


def encode(entries: Acl) -> bytes:
    """The inverse of `parse`."""
    return _HEAD.pack(_VERSION) + b"".join(
        _ENTRY.pack(entry.tag, entry.permissions, entry.holder) for entry in entries
    )


def is_minimal(entries: Acl) -> bool:
    """Whether the list says no more than a mode does."""
    return all(entry.tag in _BASE for entry in entries)


def _group_tag(entries: Acl) -> int:
    return MASK if any(entry.tag == MASK for entry in entries) else GROUP_OBJ


def mode_of(entries: Acl) -> int:
    """The nine permission bits that go with a list."""
    shifts = {USER_OBJ: 6, _group_tag(entries): 3, OTHER: 0}
    return sum(entry.permissions << shifts[entry.tag] for entry in entries if entry.tag in shifts)


def with_mode(entries: Acl, mode: int) -> Acl:
    """The list after chmod(2) to `mode`."""
    shifts = {USER_OBJ: 6, _group_tag(entries): 3, OTHER: 0}
    return tuple(
        replace(entry, permissions=mode >> shifts[entry.tag] & 7) if entry.tag in shifts else entry
        for entry in entries
    )


def inherit(default: Acl, mode: int) -> Acl:
    """The access list of something made with `mode` in a directory with a default list."""
    return with_mode(default, mode & mode_of(default))

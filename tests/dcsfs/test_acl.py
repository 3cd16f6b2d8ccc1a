"""Access control lists: parsing, and the mode that goes with them."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcsfs.fs import acl
from dcsfs.fs.errors import FsError

NOBODY = 0xFFFFFFFF


def minimal(user, group, other):
    return (
        acl.Entry(acl.USER_OBJ, user, NOBODY),
        acl.Entry(acl.GROUP_OBJ, group, NOBODY),
        acl.Entry(acl.OTHER, other, NOBODY),
    )


def extended(user, group, other, mask):
    return (
        *minimal(user, group, other),
        acl.Entry(acl.USER, 6, 1000),
        acl.Entry(acl.MASK, mask, NOBODY),
    )


@given(st.binary(max_size=60))
def test_any_bytes_are_einval_or_read_back_the_same(value):
    try:
        entries = acl.parse(value)
    except FsError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        assert acl.encode(entries) == value


BITS = st.integers(0, 7)


@given(BITS, BITS, BITS, BITS, st.integers(0, 0o777))
def test_mode_and_list_are_two_views_of_one_thing(user, group, other, mask, mode):
    assert acl.mode_of(minimal(user, group, other)) == user << 6 | group << 3 | other
    entries = extended(user, group, other, mask)
    assert acl.mode_of(entries) == user << 6 | mask << 3 | other
    assert acl.mode_of(acl.with_mode(entries, mode)) == mode
    named = [entry for entry in acl.with_mode(entries, mode) if entry.tag == acl.USER]
    assert named == [acl.Entry(acl.USER, 6, 1000)]
    assert acl.mode_of(acl.inherit(entries, mode)) == mode & acl.mode_of(entries)


@pytest.mark.parametrize(
    "entries",
    [
        minimal(7, 5, 5)[:2],
        (*minimal(7, 5, 5), acl.Entry(acl.USER, 6, 1000)),
        (*extended(7, 5, 5, 7), acl.Entry(acl.USER, 5, 1000)),
        (*minimal(7, 5, 8),),
        (*minimal(7, 5, 5), acl.Entry(0x40, 5, 0)),
    ],
)
def test_lists_that_say_nothing_sensible_are_einval(entries):
    with pytest.raises(FsError) as caught:
        acl.parse(acl.encode(entries))
    assert caught.value.errno == errno.EINVAL

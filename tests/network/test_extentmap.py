"""The extent map against a byte-per-byte reference."""

from hypothesis import given
from hypothesis import strategies as st

from network import extentmap
from network.extentmap import Row
from network.ids import ExtentID
from network.limits import MAP_WINDOW_BYTES

SPAN = 120


def _extent(number):
    return ExtentID(bytes([number]) * 16)


@st.composite
def edits(draw):
    start = draw(st.integers(0, SPAN - 1))
    end = draw(st.integers(start + 1, SPAN))
    kind = draw(st.sampled_from(["insert", "clear", "cut"]))
    return kind, start, end, draw(st.integers(0, 40))


@given(st.lists(edits(), max_size=25))
def test_map_edits_match_a_naive_reference(operations):
    rows, reference = [], {}
    for number, (kind, start, end, inside) in enumerate(operations):
        if kind == "insert":
            row = Row(start, end - start, _extent(number), inside, 0)
            extentmap.insert(rows, row)
            reference |= {o: (_extent(number), inside + o - start) for o in range(start, end)}
        elif kind == "clear":
            extentmap.clear(rows, start, end)
            reference = {o: v for o, v in reference.items() if not start <= o < end}
        else:
            extentmap.apply_edits(rows, start, [], [])
            reference = {o: v for o, v in reference.items() if o < start}
        extentmap.check_rows(rows)
        flat = {
            row.file_offset + i: (row.extent_id, row.extent_offset + i)
            for row in rows
            for i in range(row.length)
        }
        assert flat == reference
        for begin, stop, row in extentmap.runs(rows, 10, 100):
            for offset in range(begin, stop):
                assert (row is not None) == (offset in reference)


def test_map_root_sees_every_field_and_order():
    base = [Row(0, 10, _extent(1), 0, 0), Row(MAP_WINDOW_BYTES, 5, _extent(2), 3, 0)]
    roots = {
        bytes(extentmap.map_root(rows))
        for rows in (
            base,
            base[:1],
            base[1:],
            [Row(0, 9, _extent(1), 0, 0), base[1]],
            [Row(0, 10, _extent(3), 0, 0), base[1]],
            [Row(0, 10, _extent(1), 1, 0), base[1]],
            [Row(0, 10, _extent(1), 0, 1), base[1]],
            [Row(1, 10, _extent(1), 0, 0), base[1]],
            [],
        )
    }
    assert len(roots) == 9

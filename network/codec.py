"""Frozen dataclasses as bounded, fixed-order msgpack arrays.

A message is an array of its fields in declaration order; a nested dataclass is a nested array; a
union of dataclasses is `[TAG, fields]`. Everything that arrives is checked against the type hints
and the sizes given with `Annotated[bytes, Max(n)]`: nothing unchecked reaches a handler.

Signed bytes never use this encoding; they have fixed layouts of their own (docs/specs/orders.md).
"""

import enum
import types
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as _get_type_hints

import msgpack

from network.errors import InvalidArgument, ProtocolError
from network.ids import Id
from network.limits import INTEGER_MAX, INTEGER_MIN

Wire = Any  # a msgpack value: this module's whole business is to turn it into something typed
T = TypeVar("T")

BYTES_MAX_DEFAULT = 64 * 1024
TEXT_MAX_DEFAULT = 4096
ITEMS_MAX_DEFAULT = 65536


@dataclass(frozen=True, slots=True)
class Max:
    """A cap for a field: bytes for `bytes` and `str`, items for tuples."""

    limit: int


class _Tagged(Protocol):
    TAG: ClassVar[int]


_Encoder = Callable[[Any], Wire]
_Decoder = Callable[[Wire], Any]


def pack(value: object) -> bytes:
    """Encode a message. Sizes are the caller's duty here; `unpack` checks them."""
    encoder, _ = _for_type(type(value))
    packed: bytes = msgpack.packb(encoder(value), use_bin_type=True)
    return packed


def unpack(cls: type[T], data: bytes | bytearray | memoryview) -> T:
    """Decode and validate a message; raises ProtocolError and nothing else."""
    _, decoder = _for_type(cls)
    try:
        raw = msgpack.unpackb(data, raw=False, use_list=True, strict_map_key=True)
        result: T = decoder(raw)
    except ProtocolError:
        raise
    except (ValueError, TypeError, InvalidArgument, msgpack.UnpackException) as error:
        raise ProtocolError(f"malformed {cls.__name__}: {error}") from error
    except RecursionError as error:
        raise ProtocolError(f"malformed {cls.__name__}: nested too deeply") from error
    return result


_rules: dict[Any, tuple[_Encoder, _Decoder]] = {}


def _for_type(hint: Any) -> tuple[_Encoder, _Decoder]:
    rule = _rules.get(hint)
    if rule is None:
        rule = _rules[hint] = _build(hint)
    return rule


def _build(hint: Any) -> tuple[_Encoder, _Decoder]:
    limit: int | None = None
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        for extra in extras:
            if isinstance(extra, Max):
                limit = extra.limit
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _for_union(get_args(hint))
    if origin is tuple:
        return _for_tuple(get_args(hint), ITEMS_MAX_DEFAULT if limit is None else limit)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _for_dataclass(hint)
    if isinstance(hint, type):
        return _for_plain(hint, limit)
    raise TypeError(f"the codec has no rule for {hint!r}")


def _for_plain(cls: type[Any], limit: int | None) -> tuple[_Encoder, _Decoder]:
    if issubclass(cls, Id):
        return bytes, lambda raw: cls(_expect(raw, bytes))
    if issubclass(cls, enum.IntEnum):
        return int, lambda raw: cls(_expect(raw, int))
    if cls is bool:
        return _same, lambda raw: _expect(raw, bool)
    if cls is int:
        return _same, _decode_int
    if cls is bytes:
        return _same, _sized(bytes, BYTES_MAX_DEFAULT if limit is None else limit)
    if cls is str:
        return _same, _sized(str, TEXT_MAX_DEFAULT if limit is None else limit)
    raise TypeError(f"the codec has no rule for {cls!r}")


def _same(value: Any) -> Wire:
    return value


def _expect(raw: Wire, cls: type[Any]) -> Any:
    if type(raw) is not cls:
        raise ProtocolError(f"expected {cls.__name__}, got {type(raw).__name__}")
    return raw


def _decode_int(raw: Wire) -> int:
    value: int = _expect(raw, int)
    if not INTEGER_MIN <= value <= INTEGER_MAX:
        raise ProtocolError(f"the integer {value} does not fit in 64 bits with a sign")
    return value


def _sized(cls: type[Any], limit: int) -> _Decoder:
    def decode(raw: Wire) -> Any:
        if len(_expect(raw, cls)) > limit:
            raise ProtocolError(f"field of {len(raw)} passes its limit of {limit}")
        return raw

    return decode


def _for_tuple(args: tuple[Any, ...], limit: int) -> tuple[_Encoder, _Decoder]:
    assert args[1:] == (Ellipsis,), "only homogeneous tuples travel"
    encode_item, decode_item = _for_type(args[0])

    def encode(value: Any) -> Wire:
        return [encode_item(item) for item in value]

    def decode(raw: Wire) -> Any:
        if len(_expect(raw, list)) > limit:
            raise ProtocolError(f"list of {len(raw)} passes its limit of {limit}")
        return tuple([decode_item(item) for item in raw])

    return encode, decode


def _for_union(args: tuple[Any, ...]) -> tuple[_Encoder, _Decoder]:
    members = [arg for arg in args if arg is not type(None)]
    optional = len(members) < len(args)
    if len(members) == 1:
        encode_one, decode_one = _for_type(members[0])
        assert optional
        return (
            lambda value: None if value is None else encode_one(value),
            lambda raw: None if raw is None else decode_one(raw),
        )
    by_tag = {member.TAG: _for_type(member)[1] for member in members}
    assert len(by_tag) == len(members), "two members of a union share a TAG"

    def encode(value: Any) -> Wire:
        if value is None and optional:
            return None
        return [value.TAG, _for_type(type(value))[0](value)]

    def decode(raw: Wire) -> Any:
        if raw is None and optional:
            return None
        if len(_expect(raw, list)) != 2 or _expect(raw[0], int) not in by_tag:
            raise ProtocolError(f"unknown tag {str(raw[:1])[:40]}")
        return by_tag[raw[0]](raw[1])

    return encode, decode


def _for_dataclass(cls: type[Any]) -> tuple[_Encoder, _Decoder]:
    hints = _get_type_hints(cls, include_extras=True)
    names = [field.name for field in fields(cls)]
    pairs = [_for_type(hints[name]) for name in names]
    encoders = list(zip(names, (pair[0] for pair in pairs), strict=True))
    decoders = [pair[1] for pair in pairs]
    count = len(names)

    def encode(value: Any) -> Wire:
        return [encoder(getattr(value, name)) for name, encoder in encoders]

    def decode(raw: Wire) -> Any:
        if len(_expect(raw, list)) != count:
            raise ProtocolError(f"{cls.__name__} has {count} fields, got {len(raw)}")
        return cls(*[decoder(item) for decoder, item in zip(decoders, raw, strict=True)])

    return encode, decode

"""The secure transport: a Noise XX handshake, then bounded frames in Noise messages.

On the wire (docs/specs/wire.md): the initiator's magic `DCS\\x01`; handshake messages as u16
length || bytes; then records, each u16 length || one Noise transport message. The plaintext of
the records, joined, is a sequence of frames: u32 header length, u32 body length, u16 kind, then
header and body. Header and body always start a record, so bodies are decrypted in place.

The responder is always known by certificate. An initiator without an identity uses a key it
throws away after the connection: nodes cannot link two connections of one uplink.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from network.errors import IntegrityError, LimitExceeded, ProtocolError, Unavailable
from network.identity import Certificate, Identity
from network.ids import NodeID
from network.limits import FRAME_BODY_BYTES_MAX, HANDSHAKE_DEADLINE_S, TAG_BYTES
from network.noise import MESSAGE_BYTES_MAX, XX, CipherState, Handshake
from network.runtime import RawStream, with_deadline

MAGIC = b"DCS\x01"
_PROLOGUE = b"dcsfs 2026 v1 transport"
_PREFIX = struct.Struct(">IIH")
_PAYLOAD_MAX = MESSAGE_BYTES_MAX - TAG_BYTES
_RECEIVE_BUFFER_BYTES = 320 * 1024  # a whole frame of four shares, and the next one's head
_RECEIVE_BUFFER_BYTES_FIRST = 4096
_HANDSHAKE_MESSAGE_MAX = 1024
_OUTPUT_BYTES = 272 * 1024  # a frame of four shares with its tags
_OUTPUT_BUFFERS_KEPT = 24

Buffer = bytes | bytearray | memoryview


class OutputBuffers:
    """Buffers for frames on their way out, shared by a peer's connections, last used first.

    A send that does not block gives its buffer back at once, so a few stay warm in the cache
    instead of one per connection.
    """

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, size: int) -> bytearray:
        """A buffer of at least `size` bytes."""
        buffer = self._free.pop() if self._free else bytearray(max(size, _OUTPUT_BYTES))
        return buffer if len(buffer) >= size else bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """Return a buffer whose content has been sent."""
        if len(self._free) < _OUTPUT_BUFFERS_KEPT:
            self._free.append(buffer)


@dataclass(slots=True)
class Frame:
    """One frame as received; `body` is valid until the next receive if a buffer was lent."""

    kind: int
    header: bytes
    body: memoryview


class SecureStream:
    """Frames over an authenticated, encrypted stream.

    One task may send while another receives. A cancelled send or receive leaves the stream
    unusable: abort it.
    """

    def __init__(
        self,
        raw: RawStream,
        sending: CipherState,
        receiving: CipherState,
        peer: Certificate | None,
        header_bytes_max: int,
        outputs: OutputBuffers,
    ) -> None:
        self._raw = raw
        self._outputs = outputs
        self._sending = sending
        self._receiving = receiving
        self.peer = peer
        """The peer's certificate; None for an anonymous initiator."""
        self._header_bytes_max = header_bytes_max
        self.received_bytes = 0
        """Ciphertext bytes, counted as they come: whether the peer is alive inside a frame."""
        self._input = memoryview(bytearray(_RECEIVE_BUFFER_BYTES_FIRST))
        self._start = 0
        self._end = 0
        self._plain = memoryview(bytearray())
        self._plain_start = 0
        self._plain_end = 0

    async def send(self, kind: int, header: bytes, body: Sequence[Buffer] = ()) -> None:
        """Send one frame; `body` is the parts of the body in order. Raises Unavailable."""
        body_bytes = sum(len(part) for part in body)
        assert body_bytes <= FRAME_BODY_BYTES_MAX, body_bytes
        parts: list[Buffer] = [_PREFIX.pack(len(header), body_bytes, kind) + header, *body]
        pieces = [
            (part, start, min(start + _PAYLOAD_MAX, len(part)))
            for part in parts
            for start in range(0, len(part), _PAYLOAD_MAX)
        ]
        total = sum(end - start + 2 + TAG_BYTES for _, start, end in pieces)
        output = self._outputs.take(total)
        view = memoryview(output)
        position = 0
        for part, start, end in pieces:
            size = end - start + TAG_BYTES
            view[position : position + 2] = size.to_bytes(2, "big")
            position += 2
            self._sending.encrypt_into(
                memoryview(part)[start:end], view[position : position + size]
            )
            position += size
        await self._raw.send_all(view[:position])
        self._outputs.give(output)

    async def receive(self, buffer: memoryview | None = None) -> Frame:
        """Receive one frame, its body into `buffer` if it fits there.

        Raises Unavailable at the end of the stream, ProtocolError or LimitExceeded for a frame
        that is not allowed.
        """
        prefix = bytearray(_PREFIX.size)
        await self._read_into(memoryview(prefix))
        header_bytes, body_bytes, kind = _PREFIX.unpack(prefix)
        if header_bytes > self._header_bytes_max or body_bytes > FRAME_BODY_BYTES_MAX:
            raise LimitExceeded(f"frame of {header_bytes} + {body_bytes} bytes is too large")
        header = bytearray(header_bytes)
        await self._read_into(memoryview(header))
        if buffer is not None and body_bytes <= len(buffer):
            body = buffer[:body_bytes]
        else:
            body = memoryview(bytearray(body_bytes))
        await self._read_into(body)
        return Frame(kind, bytes(header), body)

    async def _read_into(self, target: memoryview) -> None:
        position, wanted = 0, len(target)
        while position < wanted:
            ready = self._plain_end - self._plain_start
            if ready:
                count = min(wanted - position, ready)
                start = self._plain_start
                target[position : position + count] = self._plain[start : start + count]
                self._plain_start += count
                position += count
                continue
            record = await self._next_record()
            size = len(record) - TAG_BYTES
            if size <= wanted - position:
                self._receiving.decrypt_into(record, target[position : position + size])
                position += size
            else:
                if len(self._plain) < size:
                    self._plain = memoryview(bytearray(size))
                self._receiving.decrypt_into(record, self._plain[:size])
                self._plain_start, self._plain_end = 0, size

    async def _next_record(self) -> memoryview:
        while True:
            start, ready, needed = self._start, self._end - self._start, 2
            if ready >= 2:
                size = int.from_bytes(self._input[start : start + 2], "big")
                if size <= TAG_BYTES:
                    raise ProtocolError(f"record of {size} bytes is too short")
                needed = 2 + size
                if ready >= needed:
                    self._start = start + needed
                    return self._input[start + 2 : start + needed]
            await self._fill(needed)

    async def _fill(self, count: int) -> None:
        """Have at least `count` ciphertext bytes buffered."""
        if count > len(self._input):  # piece data comes in: from now on take much at a time
            grown = memoryview(bytearray(_RECEIVE_BUFFER_BYTES))  # views of the old may live on
            grown[: len(self._input)] = self._input
            self._input = grown
        if self._start and (self._start == self._end or self._start + count > len(self._input)):
            rest = self._end - self._start
            self._input[:rest] = self._input[self._start : self._end]
            self._start, self._end = 0, rest
        while self._end - self._start < count:
            received = await self._raw.receive_into(self._input[self._end :])
            if received == 0:
                raise Unavailable("connection was closed by the peer")
            self._end += received
            self.received_bytes += received

    def is_stale(self) -> bool:
        """Whether an idle connection has been closed or spoken on by the peer."""
        return self._start != self._end or self._raw.has_input()

    def abort(self) -> None:
        """Close at once; idempotent."""
        self._raw.abort()


async def _send_message(raw: RawStream, message: bytes) -> None:
    await raw.send_all(len(message).to_bytes(2, "big") + message)


async def _receive_exactly(raw: RawStream, count: int) -> bytes:
    target = bytearray(count)
    position = 0
    while position < count:
        received = await raw.receive_into(memoryview(target)[position:])
        if received == 0:
            raise Unavailable("connection was closed during the handshake")
        position += received
    return bytes(target)


async def _receive_message(raw: RawStream) -> bytes:
    size = int.from_bytes(await _receive_exactly(raw, 2), "big")
    if size > _HANDSHAKE_MESSAGE_MAX:
        raise ProtocolError(f"handshake message of {size} bytes is too long")
    return await _receive_exactly(raw, size)


def _check_certificate(payload: bytes, noise_key: bytes | None) -> Certificate:
    try:
        certificate = Certificate.decode(payload)
    except IntegrityError as error:
        raise ProtocolError(str(error)) from error
    if certificate.noise_key != noise_key:
        raise ProtocolError("certificate is for another Noise key")
    return certificate


async def connect_secure(
    raw: RawStream,
    expected: NodeID,
    identity: Identity | None,
    header_bytes_max: int,
    outputs: OutputBuffers,
) -> SecureStream:
    """Run the initiator's side; accepts no one but `expected`.

    Raises ProtocolError for a wrong peer, Unavailable or DeadlineExceeded. Aborts `raw` on any
    failure or cancellation.
    """

    async def handshake() -> SecureStream:
        static = identity.noise_key if identity else X25519PrivateKey.generate()
        noise = Handshake(XX, initiator=True, prologue=_PROLOGUE, static=static)
        first = noise.write(b"")
        await raw.send_all(MAGIC + len(first).to_bytes(2, "big") + first)
        payload = noise.read(await _receive_message(raw))
        peer = _check_certificate(payload, noise.remote_static)
        if peer.node_id != expected:
            raise ProtocolError(f"expected {expected}, but {peer.node_id} answered")
        await _send_message(raw, noise.write(identity.certificate.encode() if identity else b""))
        return SecureStream(raw, *noise.split(), peer, header_bytes_max, outputs)

    try:
        return await with_deadline(HANDSHAKE_DEADLINE_S, "handshake", handshake)
    except BaseException:
        raw.abort()
        raise


async def accept_secure(
    raw: RawStream, identity: Identity, header_bytes_max: int, outputs: OutputBuffers
) -> SecureStream:
    """Run the responder's side; errors as for `connect_secure`."""

    async def handshake() -> SecureStream:
        if await _receive_exactly(raw, len(MAGIC)) != MAGIC:
            raise ProtocolError("peer does not speak this protocol")
        noise = Handshake(XX, initiator=False, prologue=_PROLOGUE, static=identity.noise_key)
        noise.read(await _receive_message(raw))
        await _send_message(raw, noise.write(identity.certificate.encode()))
        payload = noise.read(await _receive_message(raw))
        peer = _check_certificate(payload, noise.remote_static) if payload else None
        return SecureStream(raw, *noise.split(), peer, header_bytes_max, outputs)

    try:
        return await with_deadline(HANDSHAKE_DEADLINE_S, "handshake", handshake)
    except BaseException:
        raw.abort()
        raise

"""The Noise handshakes against the public cacophony vectors."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from network import noise
from network.errors import ProtocolError

VECTORS = json.loads(
    (Path(__file__).parents[1] / "vectors" / "noise-25519-aesgcm.json").read_text()
)["vectors"]


def _handshake(vector, role):
    def key(name):
        text = vector.get(f"{role}_{name}")
        return X25519PrivateKey.from_private_bytes(bytes.fromhex(text)) if text else None

    _, pattern, _, _, hash_name = vector["protocol_name"].split("_")
    remote = vector.get(f"{role}_remote_static")
    return noise.Handshake(
        getattr(noise, pattern),
        initiator=role == "init",
        prologue=bytes.fromhex(vector[f"{role}_prologue"]),
        static=key("static"),
        remote_static=bytes.fromhex(remote) if remote else None,
        hash_name=hash_name.lower(),
        generate=lambda: key("ephemeral"),
    )


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["protocol_name"])
def test_handshake_and_transport_match_public_vector(vector):
    initiator, responder = _handshake(vector, "init"), _handshake(vector, "resp")
    sides = [initiator, responder]
    ciphers = None
    for number, message in enumerate(vector["messages"]):
        payload, expected = (bytes.fromhex(message[k]) for k in ("payload", "ciphertext"))
        sender, receiver = sides[number % 2], sides[1 - number % 2]
        if not sender.finished:
            out = sender.write(payload)
            assert out == expected
            assert receiver.read(out) == payload
            continue
        if ciphers is None:
            assert initiator.hash == responder.hash == bytes.fromhex(vector["handshake_hash"])
            ciphers = [initiator.split(), responder.split()]
        out = ciphers[number % 2][0].encrypt(b"", payload)
        assert out == expected
        assert ciphers[1 - number % 2][1].decrypt(b"", out) == payload


def test_transport_survives_a_rekey_and_refuses_a_flipped_bit():
    send, receive = noise.CipherState(bytes(32)), noise.CipherState(bytes(32))
    for _ in range(3):
        send.rekey()
        receive.rekey()
    message = send.encrypt(b"", b"hello")
    assert receive.decrypt(b"", message) == b"hello"
    again = bytearray(send.encrypt(b"", b"hello"))
    again[0] ^= 1
    with pytest.raises(ProtocolError):
        receive.decrypt(b"", bytes(again))


def test_handshake_garbage_is_protocol_error():
    responder = noise.Handshake(
        noise.XX, initiator=False, prologue=b"", static=X25519PrivateKey.generate()
    )
    with pytest.raises(ProtocolError):
        responder.read(b"short")

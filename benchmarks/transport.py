"""The transport's candidates on loopback: plain TCP, TLS by trio's SSLStream, our Noise.

80 connections between two processes, frames of 64 KiB to 1 MiB. Prints MB/s and CPU seconds
per GB of each side. Usage: .venv/bin/python benchmarks/transport.py [--mib 512]
"""

import argparse
import datetime
import os
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from network.identity import Identity
from network.process import tune_allocator
from network.runtime import SocketStream
from network.transport import OutputBuffers, accept_secure, connect_secure

CONNECTIONS = 80
IDENTITY = Identity(bytes(32), bytes(8), bytes(range(32)))


def make_certificate(path: Path) -> None:
    """A self-signed certificate and its key in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + certificate.public_bytes(encoding))


async def receive_all(kind: str, stream: trio.SocketStream, size: int, pem: str) -> None:
    """Take frames until the end of the stream."""
    buffer = memoryview(bytearray(size))
    if kind == "noise":
        secure = await accept_secure(SocketStream(stream.socket), IDENTITY, 1024, OutputBuffers())
        while True:
            if len((await secure.receive(buffer)).body) == 0:
                await secure.send(0, b"")
                return
    if kind == "tls":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        wrapped = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        while await wrapped.receive_some(size):
            pass
        return
    while await stream.socket.recv_into(buffer):
        pass


async def serve(kind: str, size: int, pem: str) -> None:
    """Print the port, serve all connections, print the CPU seconds used."""
    sock = trio.socket.socket()
    await sock.bind(("127.0.0.1", 0))
    sock.listen(CONNECTIONS)
    print(sock.getsockname()[1], flush=True)
    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS):
            peer, _ = await sock.accept()
            nursery.start_soon(receive_all, kind, trio.SocketStream(peer), size, pem)
    print(cpu_seconds(), flush=True)


def cpu_seconds() -> float:
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def send_all(kind: str, port: int, size: int, count: int) -> None:
    """Send `count` frames on one connection."""
    data = os.urandom(size)
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    if kind == "noise":
        raw = SocketStream(stream.socket)
        secure = await connect_secure(raw, IDENTITY.id, None, 1024, OutputBuffers())
        for _ in range(count):
            await secure.send(2, b"", (data,))
        await secure.send(0, b"")
        await secure.receive()
        secure.abort()
        return
    if kind == "tls":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        wrapped = trio.SSLStream(stream, context, https_compatible=True)
        for _ in range(count):
            await wrapped.send_all(data)
        await wrapped.aclose()
        return
    for _ in range(count):
        await stream.send_all(data)
    await stream.aclose()


async def measure(kind: str, port: int, size: int, total: int) -> None:
    """All connections at once."""
    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS):
            nursery.start_soon(send_all, kind, port, size, max(1, total // size // CONNECTIONS))


def main() -> None:
    """Run each candidate at each size; with --serve, be the other process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--serve", nargs=3)
    options = parser.parse_args()
    tune_allocator()
    if options.serve:
        trio.run(serve, options.serve[0], int(options.serve[1]), options.serve[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        pem = Path(folder) / "pem"
        make_certificate(pem)
        for size in (64 << 10, 256 << 10, 1 << 20):
            for kind in ("plain", "noise", "tls"):
                command = [sys.executable, __file__, "--serve", kind, str(size), str(pem)]
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                    assert server.stdout is not None
                    port = int(server.stdout.readline())
                    total = options.mib << 20
                    before, started = cpu_seconds(), time.perf_counter()
                    trio.run(measure, kind, port, size, total)
                    theirs = float(server.stdout.readline())
                    elapsed = time.perf_counter() - started
                    own = cpu_seconds() - before
                moved = max(1, total // size // CONNECTIONS) * size * CONNECTIONS / 1e6
                print(
                    f"{kind:6} {size >> 10:5} KiB {moved / elapsed:7.0f} MB/s  "
                    f"CPU s/GB sender {own / moved * 1e3:.2f} receiver {theirs / moved * 1e3:.2f}"
                )


if __name__ == "__main__":
    main()

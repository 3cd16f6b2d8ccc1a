"""The network between one mount and the satellite, to be cut: a forwarder in this process."""

import contextlib
import select
import socket
import threading

STEP_S = 0.02


class Link:
    """Forwards a port of its own to `target`; `is_cut` is a partition: nothing gets through.

    As with lost packets, a connection lives on while it is cut, and nobody is told.
    """

    def __init__(self, target):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.is_cut = False
        self._is_closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while not self._is_closed:
            ready, _, _ = select.select([self._listener], [], [], STEP_S)
            if ready and not self._is_closed:
                client, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client):
        with contextlib.suppress(OSError), client:
            while self.is_cut:
                threading.Event().wait(STEP_S)
            with socket.create_connection(self._target, timeout=5) as server:
                other = {client: server, server: client}
                while not self._is_closed:
                    ready, _, _ = select.select([] if self.is_cut else list(other), [], [], STEP_S)
                    for sock in ready:
                        data = sock.recv(65536)
                        if not data:
                            return
                        other[sock].sendall(data)

    def close(self):
        """End all connections."""
        self._is_closed = True
        self._listener.close()

"""A way to a broker that breaks: a proxy that passes everything on until it is asked for a certain API."""

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

HEADER = struct.Struct(">ih")  # size, API key


class SeveringProxy:
    """The broker's one address, as its clients know it. From the first request for `api_key` on it is as dead as a broker
    that was killed: what was asked stays unanswered, connections are reset, new ones refused."""

    def __init__(self, api_key: int) -> None:
        self._api_key = api_key
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        self.severed = threading.Event()
        self.is_armed = False
        self._target = ("", 0)
        self._sockets: list[socket.socket] = []

    def start(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.severed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answers, args=(server, client), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError, struct.error):
            while head := client.recv(HEADER.size, socket.MSG_WAITALL):
                size, api_key = HEADER.unpack(head)
                body = client.recv(size - 2, socket.MSG_WAITALL)
                if self.is_armed and api_key == self._api_key:
                    self._sever()
                    return
                server.sendall(head + body)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)

    def _sever(self) -> None:
        self.severed.set()
        self._listener.close()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sever()

"""Servers for guests, in a test's network namespace: HTTP, TFTP, DNS, and a sink that returns an MD5."""

import contextlib
import hashlib
import http.server
import random
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tests.support.network import Network

MIB = 1 << 20
PIECE = random.Random(0).randbytes(MIB)
STEP = 1009  # bytes by which each piece is shifted, so that no two pieces are equal

DNS_HEADER = struct.Struct(">HHHHHH")  # RFC 1035, 4.1.1: id, flags, questions, answers, two more counts
DNS_RECORD = struct.Struct(">HHHIH")  # 4.1.3: name, type, class, time to live, length
AUTHORITATIVE_ANSWER, NAME_ERROR = 0x8500, 3
A, AAAA, INTERNET = 1, 28, 1
ADDRESS_BYTES = {A: 4, AAAA: 16}
NAME_OF_QUESTION = 0xC000 | DNS_HEADER.size

RRQ, DATA, ACK, ERROR, OACK = 1, 3, 4, 5, 6  # RFC 1350, RFC 2347
TFTP_BLOCK = 512
TFTP_TRIES, TFTP_TIMEOUT_S = 10, 2.0

Serving = contextlib.AbstractContextManager[None]
Content = Callable[[], Iterable[bytes]]


def noise(mebibytes: int) -> Iterator[bytes]:
    """Yield the pieces of a large file.  They are the same each time."""
    for number in range(mebibytes):
        at = number * STEP % MIB
        yield PIECE[at:] + PIECE[:at]


def md5(pieces: Iterable[bytes]) -> str:
    """Return the MD5 of the pieces as md5sum prints it."""
    digest = hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def running(network: Network, make: Callable[[], socketserver.BaseServer]) -> Iterator[None]:
    """Make a server in a namespace; it serves while the context lasts."""
    with network.inside():
        server = make()
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


class _Server(socketserver.ThreadingTCPServer):
    """Has a daemon thread for each connection, so that no connection blocks the end of a test."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect.  Tests check what the client received."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def files(network: Network, address: str, contents: Mapping[str, Content]) -> Serving:
    """Serve files by name with HTTP on port 80."""

    class Handler(http.server.BaseHTTPRequestHandler):
        """One request."""

        def do_GET(self) -> None:
            """Send a file, then close the connection to mark its end."""
            content = contents.get(self.path.removeprefix("/"))
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            for piece in content():
                self.wfile.write(piece)

        def log_message(self, format: str, *arguments: object) -> None:
            """Write no log."""

    kind = _Server6 if ":" in address else _Server
    return running(network, lambda: kind((address, 80), Handler))


def sink(network: Network, address: str, port: int) -> Serving:
    """Read each connection to its end, and answer with the MD5."""

    class Handler(socketserver.BaseRequestHandler):
        """One connection."""

        def handle(self) -> None:
            """Read everything, then send the MD5."""
            self.request.sendall(md5(iter(lambda: self.request.recv(1 << 18), b"")).encode())

    return running(network, lambda: _Server((address, port), Handler))


def names(network: Network, address: str, table: Mapping[str, Sequence[bytes]]) -> Serving:
    """Serve DNS for exactly these names."""

    class Handler(socketserver.DatagramRequestHandler):
        """One question."""

        def handle(self) -> None:
            """Answer it."""
            self.wfile.write(resolve(self.rfile.read(), table))

    return running(network, lambda: socketserver.UDPServer((address, 53), Handler))


def resolve(query: bytes, table: Mapping[str, Sequence[bytes]]) -> bytes:
    """Return the answer to a query with one question (RFC 1035, 4.1)."""
    ident, *_ = DNS_HEADER.unpack_from(query)
    labels, at = [], DNS_HEADER.size
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    kind, _ = struct.unpack_from(">HH", query, at + 1)
    found = table.get(".".join(labels))
    addresses = [address for address in found or () if len(address) == ADDRESS_BYTES.get(kind)]
    flags = AUTHORITATIVE_ANSWER | (NAME_ERROR if found is None else 0)
    answer = DNS_HEADER.pack(ident, flags, 1, len(addresses), 0, 0) + query[DNS_HEADER.size : at + 5]
    for address in addresses:
        answer += DNS_RECORD.pack(NAME_OF_QUESTION, kind, INTERNET, 60, len(address)) + address
    return answer


def tftp(network: Network, address: str, contents: Mapping[str, bytes]) -> Serving:
    """Serve files by name with TFTP (RFC 1350, 2347, 2348, 2349)."""

    class Handler(socketserver.BaseRequestHandler):
        """One transfer, which has a port of its own."""

        def handle(self) -> None:
            """Send a file."""
            request, _ = self.request
            with network.socket(socket.AF_INET, socket.SOCK_DGRAM) as transfer:
                transfer.bind((address, 0))
                transfer.connect(self.client_address)
                transfer.settimeout(TFTP_TIMEOUT_S)
                send_file(transfer, request, contents)

    class Server(socketserver.ThreadingUDPServer):
        """Has a thread for each transfer."""

        daemon_threads = True
        block_on_close = False

    return running(network, lambda: Server((address, 69), Handler))


def send_file(transfer: socket.socket, request: bytes, contents: Mapping[str, bytes]) -> None:
    """Serve a read request up to its last block."""
    if int.from_bytes(request[:2], "big") != RRQ:
        return
    name, _mode, *words = (word.decode() for word in request[2:].split(b"\0")[:-1])
    options = {key.lower(): value for key, value in zip(words[::2], words[1::2], strict=False)}
    data = contents.get(name)
    if data is None:
        transfer.send(struct.pack(">HH", ERROR, 1) + b"no such file\0")
        return
    size, block = int(options.get("blksize", TFTP_BLOCK)), 0
    accepted = {"blksize": str(size)} if "blksize" in options else {}
    if "tsize" in options:
        accepted["tsize"] = str(len(data))
    if accepted:
        words = [word for pair in accepted.items() for word in pair]
        send_block(transfer, struct.pack(">H", OACK) + b"".join(word.encode() + b"\0" for word in words), 0)
    for at in range(0, len(data) + 1, size):  # the last block is shorter than `size`, and possibly empty
        block = block + 1 & 0xFFFF
        send_block(transfer, struct.pack(">HH", DATA, block) + data[at : at + size], block)


def send_block(transfer: socket.socket, packet: bytes, block: int) -> None:
    """Send a block again until it is acknowledged.  Raises TimeoutError."""
    for _ in range(TFTP_TRIES):
        transfer.send(packet)
        with contextlib.suppress(TimeoutError):
            while True:
                answer = transfer.recv(512)
                if answer[:4] == struct.pack(">HH", ACK, block):
                    return
                if int.from_bytes(answer[:2], "big") == ERROR:
                    raise ConnectionAbortedError(answer[4:])
    raise TimeoutError(f"block {block} was not acknowledged")

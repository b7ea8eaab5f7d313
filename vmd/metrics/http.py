"""The part of HTTP that a scraper needs (RFC 9112): one request for one page, one answer, then the end."""

from vmd.errors import VmdError
from vmd.exposition import OPENMETRICS_TYPE, TEXT_TYPE

REQUEST_BYTES_MAX = 8192
PATH = "/metrics"
METHODS = ("GET", "HEAD")
REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class BadRequest(VmdError):
    """A request that is answered with a status other than 200."""

    def __init__(self, status: int) -> None:
        super().__init__(REASONS[status])
        self.status = status


class Asked:
    """The request of a client."""

    __slots__ = ("head", "openmetrics")

    def __init__(self, *, head: bool, openmetrics: bool) -> None:
        self.head = head  # the client wants only the header of the answer
        self.openmetrics = openmetrics


def parse(data: bytes) -> Asked | None:
    """Parse the bytes that a client has sent so far.  Return None if the request is not complete.

    Raises BadRequest.
    """
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        if len(data) > REQUEST_BYTES_MAX:
            raise BadRequest(431)
        return None
    if len(head) > REQUEST_BYTES_MAX:
        raise BadRequest(431)
    line, *fields = head.decode("latin-1").split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not all(words):
        raise BadRequest(400)
    method, target, version = words
    if not version.startswith("HTTP/"):
        raise BadRequest(400)
    if not version.startswith("HTTP/1."):
        raise BadRequest(505)
    if method not in METHODS:
        raise BadRequest(405)
    if target.partition("?")[0] != PATH:
        raise BadRequest(404)
    accept = []
    for field in fields:
        name, colon, value = field.partition(":")
        if not colon or not name or name != name.strip():
            raise BadRequest(400)
        if name.lower() == "accept":
            accept.append(value)
    return Asked(head=method == "HEAD", openmetrics=prefers_openmetrics(",".join(accept)))


def prefers_openmetrics(accept: str) -> bool:
    """Return whether a client prefers OpenMetrics to text, by its Accept header (RFC 9110, 12.5.1)."""
    best = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for item in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        if kind in best:
            best[kind] = max(best[kind], quality(parameters))
    openmetrics, text = best.values()
    return openmetrics > 0 and openmetrics >= text


def quality(parameters: list[str]) -> float:
    """Return the weight of a media type, from 0 to 1.  A malformed weight is 0."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0


def page(asked: Asked, text: bytes) -> list[bytes]:
    """Return the answer to a request, in pieces.  `text` has the requested format; clients share it."""
    head = header(200, OPENMETRICS_TYPE if asked.openmetrics else TEXT_TYPE, len(text))
    return [head] if asked.head else [head, text]


def refusal(status: int) -> list[bytes]:
    """Return the answer to a request that cannot be served."""
    text = f"{REASONS[status]}\n".encode()
    return [header(status, "text/plain; charset=utf-8", len(text)) + text]


def header(status: int, kind: str, length: int) -> bytes:
    """Return the header of an answer."""
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        f"Content-Type: {kind}",
        f"Content-Length: {length}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    ]
    if status == 405:
        lines.append(f"Allow: {', '.join(METHODS)}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()

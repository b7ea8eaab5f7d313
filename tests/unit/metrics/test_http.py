"""HTTP requests of scrapers, and the answers."""

import contextlib
import random

import pytest

from vmd.metrics.http import REQUEST_BYTES_MAX, Asked, BadRequest, page, parse, prefers_openmetrics, refusal

PROMETHEUS = (
    b"GET /metrics HTTP/1.1\r\nHost: host:9177\r\nUser-Agent: Prometheus/2.42.0\r\n"
    b"Accept: application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    b"text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\nAccept-Encoding: gzip\r\n\r\n"
)


def asked(data: bytes) -> Asked:
    """Return a complete request, parsed."""
    found = parse(data)
    assert found is not None
    return found


def test_prometheus_gets_openmetrics() -> None:
    """It asks for that.  Other clients get text."""
    assert (asked(PROMETHEUS).openmetrics, asked(PROMETHEUS).head) == (True, False)
    assert not asked(b"GET /metrics HTTP/1.0\r\n\r\n").openmetrics
    assert asked(b"HEAD /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n").head


@pytest.mark.parametrize(("accept", "openmetrics"), [
    ("", False), ("*/*", False), ("text/plain", False), ("application/openmetrics-text", True),
    ("Application/OpenMetrics-Text; Version=1.0.0", True),
    ("text/plain, application/openmetrics-text", True),
    ("text/plain, application/openmetrics-text;q=0.5", False),
    ("text/plain;q=0.3, application/openmetrics-text;q=0.5", True),
    ("application/openmetrics-text;q=0", False), ("application/openmetrics-text;q=x", False),
    ("application/openmetrics-text;q=nan", False), ("application/openmetrics-text;q=-1", False),
])  # fmt: skip
def test_the_format_is_the_one_that_is_preferred(accept: str, openmetrics: bool) -> None:
    """The weights decide, and a malformed weight is 0."""
    assert prefers_openmetrics(accept) is openmetrics


@pytest.mark.parametrize(("data", "status"), [
    (b"GET / HTTP/1.1\r\n\r\n", 404), (b"GET /metricsx HTTP/1.1\r\n\r\n", 404), (b"GET x HTTP/1.1\r\n\r\n", 404),
    (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405), (b"get /metrics HTTP/1.1\r\n\r\n", 405),
    (b"GET /metrics HTTP/2.0\r\n\r\n", 505), (b"GET /metrics SPDY/1.1\r\n\r\n", 400),
    (b"GET  /metrics HTTP/1.1\r\n\r\n", 400), (b"GET /metrics\r\n\r\n", 400), (b"\r\n\r\n", 400),
    (b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n", 400), (b"GET /metrics HTTP/1.1\r\nAccept : x\r\n\r\n", 400),
    (b"GET /metrics HTTP/1.1\r\n folded: x\r\n\r\n", 400),
    (b"GET /" + bytes(REQUEST_BYTES_MAX), 431), (b"GET /" + b"x" * REQUEST_BYTES_MAX + b" HTTP/1.1\r\n\r\n", 431),
])  # fmt: skip
def test_bad_requests_are_refused(data: bytes, status: int) -> None:
    """The status says why."""
    with pytest.raises(BadRequest) as refused:
        parse(data)

    assert refused.value.status == status
    assert refusal(status)[0].startswith(f"HTTP/1.1 {status} ".encode())
    assert (b"\r\nAllow: GET, HEAD\r\n" in refusal(status)[0]) is (status == 405)


def test_an_incomplete_request() -> None:
    """Every prefix is incomplete."""
    assert [parse(PROMETHEUS[:length]) for length in range(len(PROMETHEUS))] == [None] * len(PROMETHEUS)


def test_the_longest_request() -> None:
    """One more byte is refused, whether the request is complete or not."""
    head = b"GET /metrics HTTP/1.1\r\nx: "
    longest = head + b"y" * (REQUEST_BYTES_MAX - len(head))
    assert parse(longest) is None
    assert parse(longest + b"\r\n\r\n") is not None
    for data in (longest + b"y", longest + b"y\r\n\r\n"):
        with pytest.raises(BadRequest) as refused:
            parse(data)
        assert refused.value.status == 431


def test_any_bytes() -> None:
    """Any bytes are parsed or refused."""
    source = random.Random(1)
    for _ in range(2000):
        data = bytearray(PROMETHEUS)
        for _ in range(source.randrange(1, 6)):
            data[source.randrange(len(data))] = source.randrange(256)
        for each in (bytes(data), source.randbytes(source.randrange(64)) + b"\r\n\r\n"):
            with contextlib.suppress(BadRequest):
                parse(each)


def test_answers() -> None:
    """The length is that of the text.  HEAD gets no text."""
    head, text = page(Asked(head=False, openmetrics=False), b"x 1\n")
    assert text == b"x 1\n"
    assert b"\r\nContent-Length: 4\r\n" in head
    assert b"\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in head
    assert head.endswith(b"\r\nConnection: close\r\n\r\n")
    assert page(Asked(head=True, openmetrics=False), b"x 1\n") == [head]
    assert b"application/openmetrics-text; version=1.0.0" in page(Asked(head=True, openmetrics=True), b"")[0]

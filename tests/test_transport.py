"""One request, once, against a server on raw sockets: what leaves, and what every ending means."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import httpx
import PIL.Image
import pytest
from blackbox_vlm.backends import _client
from blackbox_vlm.backends.transport import MAX_HEADERS, MAX_REFUSAL, Reply, Transport

from blackbox_vlm.backend import Quota, TextScores, open_backend
from blackbox_vlm.errors import (
    AuthError,
    BackendError,
    ContractError,
    InputError,
    NotSent,
    QuotaError,
    RateLimited,
    Refused,
    UnknownOutcome,
)
from blackbox_vlm.images import Image
from blackbox_vlm.running import run_sync
from blackbox_vlm.secret import Secret
from blackbox_vlm.testing.server import (
    Act,
    Authority,
    ScriptedServer,
    Step,
    closing,
    dripping,
    hang_up,
    late,
    message,
    never,
    reply,
    reset,
    sending,
)

KEY = "sk-planted/4f9a+7c=="
GOOD = reply(b'{"fine": [1, 2.5]}')


def using(transport: Transport, work: Callable[[Transport], Coroutine[Any, Any, Any]]) -> Any:
    """Do some work with a transport in a loop of its own, and close it."""

    async def do() -> Any:
        try:
            return await work(transport)
        finally:
            await transport.aclose()

    return run_sync(do())


def post(url: str, body: object = None, **options: Any) -> Reply:
    reply: Reply = using(Transport(url, **options), lambda t: t.post(body))
    return reply


def failure(url: str, **options: Any) -> BackendError:
    with pytest.raises(BackendError) as caught:
        post(url, **options)
    return caught.value


def answered(step: Step, **options: Any) -> BackendError:
    """The error in which a step ends; the server saw exactly one request."""
    with ScriptedServer(step) as server:
        error = failure(server.url, **options)
    assert len(server.received) == 1
    return error


# -- what leaves --------------------------------------------------------------------------------


def test_a_request_and_its_answer() -> None:
    quota = {"x-ratelimit-remaining-requests": "7", "x-ratelimit-reset-requests": "1m30s"}
    with ScriptedServer(reply(b'{"fine": [1, 2.5]}', headers=quota)) as server:
        transport = Transport(
            f"{server.url}/v1/?team=a",
            headers={"Accept": "application/vnd.x+json", "X-Api-Key": Secret(KEY)},
        )
        answer = using(transport, lambda t: t.post({"é": 1}, path="/score", headers={"Idem": "7"}))
    [seen] = server.received
    assert (seen.method, seen.path) == ("POST", "/v1/score?team=a")
    assert json.loads(seen.body) == {"é": 1}
    assert seen.headers["x-api-key"] == KEY
    assert seen.headers["idem"] == "7"
    assert seen.headers["accept"] == "application/vnd.x+json"
    assert seen.headers["accept-encoding"] == "identity"
    assert seen.headers["content-type"] == "application/json"
    assert answer.data == {"fine": [1, 2.5]}
    assert answer.quota == Quota(7, 90.0)


def test_reading_costs_a_get() -> None:
    with ScriptedServer(GOOD) as server:
        using(Transport(server.url), lambda t: t.get("/models"))
    assert (server.received[0].method, server.received[0].path) == ("GET", "/models")
    assert server.received[0].body == b""


def test_connections_are_kept_and_bounded() -> None:
    async def many(transport: Transport) -> None:
        for _ in range(3):
            await transport.post(1)
        await asyncio.gather(*(transport.post(1) for _ in range(20)))

    with ScriptedServer(late(0.01, GOOD)) as server:
        using(Transport(server.url, connections=4), many)
    assert len(server.received) == 23
    assert server.connections == 4


def test_a_transport_lives_in_one_loop_after_another() -> None:
    with ScriptedServer(GOOD) as server:
        transport = Transport(server.url)
        for _ in range(2):
            run_sync(transport.post(1))  # not closed: the end of the loop closes it
        using(transport, lambda t: t.post(1))
        run_sync(transport.aclose())
    assert server.connections == 3


def test_no_cookie_is_kept() -> None:
    async def twice(transport: Transport) -> None:
        await transport.post(1)
        await transport.post(1)

    with ScriptedServer(reply(b"1", headers={"set-cookie": "tracked=1; path=/"})) as server:
        using(Transport(server.url), twice)
    assert [seen.headers.get("cookie") for seen in server.received] == [None, None]


# -- who is spoken to ---------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_a_trusted_certificate(authority: Authority) -> None:
    with ScriptedServer(GOOD, tls=authority.sign()) as server:
        assert post(server.url, ca_file=authority.ca_file).data == {"fine": [1, 2.5]}


@pytest.mark.parametrize("fault", ["nobody's", "expired", "of another host"])
def test_no_trust_no_request(fault: str, authority: Authority, tmp_path: Path) -> None:
    contexts = {
        "nobody's": Authority(tmp_path).sign,
        "expired": lambda: authority.sign(expired=True),
        "of another host": lambda: authority.sign("elsewhere.example"),
    }
    tls = contexts[fault]()
    trusted = Authority(tmp_path) if fault == "nobody's" else authority
    with ScriptedServer(GOOD, tls=tls) as server:
        error = failure(server.url, ca_file=trusted.ca_file)
    assert isinstance(error, NotSent)
    assert error.final
    assert "did not prove who it is" in str(error)
    assert server.received == []
    assert server.connections == 1


@pytest.mark.parametrize(
    ("first_words", "final"), [(b"HTTP/1.1 400 No\r\n\r\n", True), (b"", False)]
)
def test_who_does_not_speak_tls_is_not_asked_again(first_words: bytes, final: bool) -> None:
    """Who only breaks off in the handshake may be."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(first_words)

        serving = threading.Thread(target=serve)
        serving.start()
        error = failure(f"https://127.0.0.1:{listener.getsockname()[1]}")
        serving.join()
    assert isinstance(error, NotSent)
    assert error.final is final


@pytest.mark.parametrize("ending", [reset, hang_up, sending(b"HTTP/1.1 200", Act.RESET)])
def test_what_breaks_off_inside_tls_was_sent(ending: Step, authority: Authority) -> None:
    with ScriptedServer(ending, tls=authority.sign()) as server:
        error = failure(server.url, ca_file=authority.ca_file)
    assert isinstance(error, UnknownOutcome)
    assert len(server.received) == 1


def test_garbage_inside_tls_comes_after_the_request(authority: Authority) -> None:
    """It is an error of TLS, and yet not one of trust: the request was sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            plain, _ = listener.accept()
            with authority.sign().wrap_socket(plain, server_side=True) as connection:
                connection.recv(10_000)
                socket.socket.sendall(connection, b"this is no record of TLS")

        serving = threading.Thread(target=serve)
        serving.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        error = failure(url, ca_file=authority.ca_file)
        serving.join()
    assert isinstance(error, UnknownOutcome)
    assert error.__context__ is None


def test_the_environment_does_not_widen_trust(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_client, "_usual_context", _client._context)  # without its cache
    log = tmp_path / "tls-secrets"
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    with ScriptedServer(GOOD, tls=authority.sign()) as server:
        assert failure(server.url).final
        post(server.url, ca_file=authority.ca_file)
    assert not log.exists()


def test_a_ca_file_is_read_at_once(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("no certificate")
    for path in (empty, tmp_path / "missing.pem"):
        with pytest.raises(InputError, match="wanted PEM"):
            Transport("https://api.example", ca_file=path)


def test_proxies_and_netrc_count_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("NO_PROXY", raising=False)
    with ScriptedServer(GOOD) as server, ScriptedServer(GOOD) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        post(server.url)
        assert (len(server.received), len(proxy.received)) == (1, 0)
        assert "authorization" not in server.received[0].headers
        post(server.url, use_env_proxy=True)
        assert (len(server.received), len(proxy.received)) == (1, 1)
        assert "authorization" not in proxy.received[0].headers


@pytest.mark.parametrize("step", [reply(b"", 502), never, hang_up], ids=["no", "hangs", "gone"])
def test_a_proxy_that_does_not_connect_has_sent_nothing(
    step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer(step) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        error = failure(
            "https://api.example",
            use_env_proxy=True,
            timeout=0.3,
            headers={"Authorization": Secret(KEY, prefix="Bearer ")},
        )
    assert isinstance(error, NotSent)
    assert proxy.received[0].method == "CONNECT"
    assert "authorization" not in proxy.received[0].headers


# -- what never left ----------------------------------------------------------------------------


def test_nobody_listens() -> None:
    with ScriptedServer(GOOD) as server:
        url = server.url
    error = failure(url)
    assert isinstance(error, NotSent)
    assert not error.final
    assert url in str(error)


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    error = failure("https://nowhere.example/v1")
    assert isinstance(error, NotSent)
    assert "https://nowhere.example cannot be reached" in str(error)


def test_a_handshake_without_end_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        error = failure(f"https://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)
    assert isinstance(error, NotSent)
    assert time.monotonic() - began < 0.6


def test_who_waits_for_a_connection_has_sent_nothing() -> None:
    async def two(transport: Transport) -> list[Any]:
        both = (transport.post(number) for number in range(2))
        return await asyncio.gather(*both, return_exceptions=True)

    with ScriptedServer(never) as server:
        errors = using(Transport(server.url, connections=1, timeout=0.3), two)
    assert [type(error) for error in errors] == [UnknownOutcome, NotSent]
    assert len(server.received) == 1


def test_a_header_that_cannot_be_sent() -> None:
    with ScriptedServer(GOOD) as server:
        error = failure(server.url, headers={"x-note": "two\nlines"})
    assert isinstance(error, NotSent)
    assert error.final
    assert server.received == []


def test_http2_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h2", None)
    with pytest.raises(InputError, match="pip install"):
        Transport("https://api.example", http2=True)


# -- what was lost ------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\n"
LOST = {
    "no answer": never,
    "reset": reset,
    "closed": hang_up,
    "reset in the headers": sending(HEAD + b"content-", Act.RESET),
    "no HTTP": sending(b"SSH-2.0-server\r\n\r\n"),
    "too short": sending(HEAD + b"content-length: 9\r\n\r\n{}", Act.CLOSE),
    "broken chunk": sending(HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n"),
    "gzip in transfer": sending(HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "drip": dripping(GOOD, 0.1),
    "too long": reply(b" " * 2**20 + b"{}"),
    "gzip": reply(gzip.compress(b"{}"), headers={"content-encoding": "gzip"}),
    "twice gzip": reply(b"", headers={"content-encoding": "gzip, gzip"}),
    "zstd": reply(b"", headers={"content-encoding": "ZSTD"}),
    "a long header": reply(b"{}", headers={"x-long": "x" * MAX_HEADERS}),
    "a very long header": reply(b"{}", headers={"x-long": "x" * 100 * 1024}),
    "many headers": reply(b"{}", headers={f"x-{n}": "" for n in range(10_000)}),
    "503": reply(b"later", 503),
    "408": reply(b"", 408),
}


@pytest.mark.parametrize("fault", LOST)
def test_a_lost_answer(fault: str) -> None:
    error = answered(LOST[fault], timeout=0.3)
    assert isinstance(error, UnknownOutcome)
    assert "charged" in str(error)
    assert not error.final


def test_the_deadline_is_one_for_the_whole_request() -> None:
    with ScriptedServer(dripping(GOOD, 0.2)) as server:
        transport = Transport(server.url, timeout=1.0)
        began = time.monotonic()
        with pytest.raises(UnknownOutcome, match="did not finish"):
            using(transport, lambda t: t.post(1))
        assert 1.0 <= time.monotonic() - began < 1.1 + 0.2  # 10 %, and a busy machine


def test_a_kept_connection_that_is_closed_as_we_send() -> None:
    async def twice(transport: Transport) -> None:
        await transport.post(1)
        await transport.post(1)

    with ScriptedServer(GOOD, [GOOD, hang_up]) as server, pytest.raises(UnknownOutcome):
        using(Transport(server.url), twice)
    assert [seen.connection for seen in server.received] == [0, 0]  # and no third one


def test_a_kept_connection_that_was_closed_before() -> None:
    async def twice(transport: Transport) -> None:
        await transport.post(1)
        await asyncio.sleep(0.05)
        await transport.post(1)

    with ScriptedServer(GOOD, [closing(GOOD)]) as server:
        using(Transport(server.url), twice)
    assert [seen.connection for seen in server.received] == [0, 1]


def test_an_endless_body_is_cut_off() -> None:
    endless = sending(HEAD + b"\r\n", *[b"0" * 2**16] * 400)
    with ScriptedServer(endless) as server:
        error = failure(server.url)
    assert "more than 1048576 bytes" in str(error)
    assert server.sent < 16 * 2**20


def test_a_larger_answer_is_read_where_it_is_expected() -> None:
    body = json.dumps("x" * 2**20).encode()
    with ScriptedServer(reply(body)) as server:
        answer = using(Transport(server.url), lambda t: t.post(1, most=len(body)))
        assert len(answer.data) == 2**20
        with pytest.raises(UnknownOutcome):
            using(Transport(server.url), lambda t: t.post(1, most=len(body) - 1))


# -- what a complete answer means ---------------------------------------------------------------

NO_CREDIT = b'{"error": {"code": "insufficient_quota"}}'
MEANINGS: list[tuple[int, bytes, type[BackendError], bool]] = [
    (301, b"", Refused, True),
    (307, b"", Refused, True),
    (400, b"", Refused, True),
    (401, b"", AuthError, False),
    (402, b"", QuotaError, False),
    (403, b"", AuthError, False),
    (403, NO_CREDIT, QuotaError, False),
    (404, b"", Refused, True),
    (413, b"", Refused, True),
    (422, b"", Refused, True),
    (429, b"", RateLimited, False),
    (429, NO_CREDIT, QuotaError, False),
    (500, b"", UnknownOutcome, False),
    (504, b"", UnknownOutcome, False),
]


@pytest.mark.parametrize(("status", "body", "kind", "final"), MEANINGS)
def test_what_a_status_means(
    status: int, body: bytes, kind: type[BackendError], final: bool
) -> None:
    error = answered(reply(body, status))
    assert type(error) is kind
    assert error.final is final


def test_an_endpoint_says_how_it_is_busy() -> None:
    busy = reply(b"", 503, {"retry-after": "7"})
    error = answered(busy, busy=frozenset({503}))
    assert isinstance(error, RateLimited)
    assert error.retry_after == 7
    lost = answered(busy)
    assert isinstance(lost, UnknownOutcome)
    assert lost.retry_after == 7
    refused = answered(reply(b"", 429, {"x-should-retry": "false"}))
    assert isinstance(refused, RateLimited)
    assert refused.final


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://elsewhere.example/v2?key=1", "https://elsewhere.example,"),
        ("http://elsewhere.example/v2?key=1", "'http://elsewhere.example/v2'"),
        ("/v2?key=1", "'/v2'"),
        ("https://bücher.example", "https://xn--bcher-kva.example,"),
    ],
)
def test_a_redirect_is_named_and_not_followed(location: str, shown: str) -> None:
    headers = {"location": location.encode().decode("latin-1")}
    error = answered(reply(b"", 308, headers))
    assert f"redirects to {shown}" in str(error)
    assert "key=1" not in str(error)


@pytest.mark.parametrize("size", [MAX_REFUSAL - 100, 2_500_000])
def test_a_refusal_is_quoted_in_one_short_line(size: int) -> None:
    body = b'{"detail":\n "labels: \x1b[31m too \xe2\x80\xae many"}' + b"x" * size
    error = answered(reply(body, 422))
    assert type(error) is Refused
    assert '{"detail": "labels: ?[31m too ? many"}xxx' in str(error)
    assert len(str(error)) < 400


def test_a_refusal_counts_even_when_it_cannot_be_read() -> None:
    packed = reply(gzip.compress(b"no"), 401, {"content-encoding": "gzip"})
    error = answered(packed)
    assert isinstance(error, AuthError)
    assert "answered 401: (nothing)" in str(error)


def test_a_refusal_without_end_is_not_read_to_the_end() -> None:
    endless = sending(b"HTTP/1.1 422 No\r\n\r\n", *[b"no " * 2**14] * 400)
    with ScriptedServer(endless) as server:
        assert type(failure(server.url)) is Refused
    assert server.sent < 16 * 2**20


BROKEN = [b"", b"<html>", b"\xef\xbb\xbf{}", b'["\xe9"]', b"[NaN]", b"[1e999]", b"[" * 10**6]


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: repr(body[:6]))
def test_an_answer_that_is_no_json(body: bytes) -> None:
    error = answered(reply(body))
    assert type(error) is ContractError
    assert error.__context__ is None


def test_the_content_decides_and_not_its_label() -> None:
    with ScriptedServer(reply(b"[1]", headers={"content-type": "text/html"})) as server:
        assert post(server.url).data == [1]
    assert type(answered(reply(b"", 204))) is ContractError


# -- the key ------------------------------------------------------------------------------------


def leaks(error: BaseException | None) -> list[str]:
    """Lines of a traceback with the locals of every frame, over all causes, that show the key."""
    assert error is not None
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    shown.__suppress_context__ = False
    lines = [*"".join(shown.format()).splitlines(), repr(error), str(error), repr(vars(error))]
    hidden = error.__context__ or error.__cause__
    ours = [line for line in lines if KEY in line]
    return ours + (leaks(hidden) if hidden is not None else [])


ECHO: Step = lambda seen: [  # noqa: E731
    message(json.dumps(seen.headers).replace("/", "\\/").encode(), 401)
]


@pytest.mark.parametrize(
    "step",
    [ECHO, reply(KEY.encode(), 500), reply(KEY.encode()), never, reset, GOOD],
    ids=["echo", "error", "answer", "timeout", "reset", "fine"],
)
def test_no_message_frame_or_log_line_shows_the_key(
    step: Step, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("", "httpx", "httpcore", "blackbox_vlm"):
        caplog.set_level(logging.DEBUG, name)
    with ScriptedServer(step) as server:
        headers = {"Authorization": Secret(KEY, prefix="Bearer ")}
        transport = Transport(f"{server.url}/v1?team=hidden", headers=headers, timeout=0.2)
        errors: list[BackendError] = []
        try:
            using(transport, lambda t: t.post({"picture": 1}))
        except BackendError as error:
            errors.append(error)
    assert bool(errors) is (step is not GOOD)
    assert not [line for error in errors for line in leaks(error)]
    assert "hidden" not in "".join(map(str, errors))
    assert server.received[0].headers["authorization"] == f"Bearer {KEY}"
    ours = [record for record in caplog.records if record.name.startswith("blackbox_vlm")]
    assert len(ours) == 1
    assert "hidden" not in ours[0].getMessage()
    assert len(caplog.records) > len(ours)  # httpx and httpcore do talk at DEBUG
    assert KEY not in caplog.text


def test_a_request_cancelled_in_flight_shows_no_key() -> None:
    async def cancelled(transport: Transport) -> asyncio.CancelledError:
        task = asyncio.create_task(transport.post(1))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        return caught.value

    with ScriptedServer(never) as server:
        transport = Transport(server.url, headers={"X-Api-Key": Secret(KEY)})
        error = using(transport, cancelled)
    assert len(server.received) == 1
    assert len(traceback.extract_tb(error.__traceback__)) > 5  # it has been through httpx
    assert not leaks(error)


def test_libraries_that_print_urls_are_quiet_by_default() -> None:
    code = "import blackbox_vlm.backends.transport, logging; logging.basicConfig(level='DEBUG');"
    code += "print([logging.getLogger(n).isEnabledFor(20) for n in ('httpx', 'httpcore')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, False]"


# -- doubles and HTTP/2 -------------------------------------------------------------------------


def raising(error: type[httpx.TransportError]) -> httpx.MockTransport:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error("scripted", request=request)

    return httpx.MockTransport(handler)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError, NotSent),
        (httpx.ConnectTimeout, NotSent),
        (httpx.PoolTimeout, NotSent),
        (httpx.ProxyError, NotSent),
        (httpx.ReadTimeout, UnknownOutcome),
        (httpx.ReadError, UnknownOutcome),
        (httpx.WriteTimeout, UnknownOutcome),
        (httpx.WriteError, UnknownOutcome),
        (httpx.CloseError, UnknownOutcome),
        (httpx.RemoteProtocolError, UnknownOutcome),
        (httpx.LocalProtocolError, UnknownOutcome),  # with HTTP/2 it can come late
    ],
)
def test_a_transport_in_place_of_the_network(
    error: type[httpx.TransportError], kind: type[BackendError]
) -> None:
    assert type(failure("https://api.example", inner=raising(error))) is kind


class Http2Server:
    """Answers every stream of one connection, or does so wrong.

    Args:
        fault: "goes away" instead of an answer, or "garbage" in its place; "" for none.
    """

    def __init__(self, authority: Authority, fault: str = "") -> None:
        self._tls = authority.sign()
        self._tls.set_alpn_protocols(["h2"])
        self._fault = fault
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self.streams = 0
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Http2Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        plain, _ = self._listener.accept()
        with self._tls.wrap_socket(plain, server_side=True) as sock:
            link = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
            link.initiate_connection()
            sock.sendall(link.data_to_send())
            while data := sock.recv(65536):
                for event in link.receive_data(data):
                    if isinstance(event, h2.events.StreamEnded) and event.stream_id is not None:
                        self._answer(link, event.stream_id)
                sock.sendall(link.data_to_send())
                if self._fault and self.streams:
                    sock.sendall(b"\xff" * 100 * (self._fault == "garbage"))
                    return

    def _answer(self, link: h2.connection.H2Connection, stream: int) -> None:
        self.streams += 1
        if self._fault == "goes away":
            link.close_connection(error_code=2)
            return
        link.send_headers(stream, [(":status", "200"), ("content-type", "application/json")])
        if not self._fault:
            link.send_data(stream, b"[2]", end_stream=True)


def test_http2(authority: Authority) -> None:
    async def three(transport: Transport) -> list[Reply]:
        return await asyncio.gather(*(transport.post(number) for number in range(3)))

    with Http2Server(authority) as server:
        transport = Transport(server.url, http2=True, ca_file=authority.ca_file)
        answers = using(transport, three)
    assert [answer.data for answer in answers] == [[2]] * 3
    assert server.streams == 3


@pytest.mark.parametrize("fault", ["goes away", "garbage"])
def test_http2_that_breaks_has_lost_the_answer(fault: str, authority: Authority) -> None:
    with Http2Server(authority, fault) as server:
        error = failure(server.url, http2=True, ca_file=authority.ca_file)
    assert isinstance(error, UnknownOutcome)
    assert not leaks(error)
    assert server.streams == 1


def test_a_key_that_an_answer_repeats_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a label, and as the name of the model."""
    monkeypatch.setenv("ENDPOINT_KEY", KEY)
    picture = tmp_path / "picture.png"
    PIL.Image.new("RGB", (4, 4)).save(picture)
    labels = [{"label": KEY, "score": 0.5}, {"label": "b", "score": 0.5}]
    scored = {"model": KEY, "data": [{"index": 0, "score": 0.5}], "usage": {}}
    cases = (("zero-shot", labels, ("a", "b")), ("score", scored, ("a",)))
    for protocol, body, texts in cases:
        answers = httpx.MockTransport(
            lambda _, body=body: httpx.Response(
                200, stream=httpx.ByteStream(json.dumps(body).encode())
            )
        )
        url = "http://127.0.0.1:1"
        backend = open_backend(protocol, url=url, model="m", key_env="ENDPOINT_KEY", inner=answers)
        [outcome] = run_sync(backend.answer([TextScores((Image.from_file(picture),), texts)]))
        assert KEY not in f"{outcome!r} {outcome}"
        assert "***" in f"{outcome!r} {outcome}"

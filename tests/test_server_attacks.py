"""Row 56 of the fault matrix: the server is attacked, says no, and still serves.

On a real socket where the attack is one of framing, timing or number; in-process otherwise.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from blackbox_vlm.backends.server import ServerSettings, running_server
from doubles import LinearWorld
from serving import app_of, asked, call, encoded, picture, post, usage, world

from blackbox_vlm.backend import Access, Answer, Request
from blackbox_vlm.running import run_sync
from blackbox_vlm.secret import Secret

SCORES = "/blackbox/v1/scores"
TOKEN = "a-token-for-tests"
MIB = 2**20


@contextmanager
def attacked(backend: LinearWorld | None = None, **settings: Any) -> Iterator[str]:
    """A server that must still serve after what is done to it."""
    with running_server(backend or world(), ServerSettings(**settings)) as url:
        yield url
        token = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.post(url + SCORES, json=asked(), headers=token).status_code == 200


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def head(path: str = SCORES, **headers: object) -> bytes:
    """The start of a POST."""
    given = {"host": "127.0.0.1", "content-type": "application/json", **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in given.items()]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode()


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes, or resets, the connection."""
    received = bytearray()
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return bytes(received)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# -- who ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer \xff"],
)
@pytest.mark.parametrize("path", [SCORES, "/usage", "/blackbox/v1/capabilities", "/nothing"])
def test_nobody_asks_without_the_token(header: str, path: str) -> None:
    app = app_of(token=Secret(TOKEN))
    headers = {"Authorization": header.encode("latin-1")} if header else {}
    method = "POST" if path == SCORES else "GET"
    refused = call(app, method, path, json=asked(), headers=headers)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert usage(app, authorization=f"bearer {TOKEN}")["billed"] == 0
    assert post(app, SCORES, asked(), Authorization=f"Bearer {TOKEN}").status_code == 200


def test_health_and_description_need_no_token() -> None:
    app = app_of(token=Secret(TOKEN))
    for path in ("/v2/health/live", "/v2/health/ready", "/openapi.json"):
        assert call(app, "GET", path).status_code == 200
    assert TOKEN not in call(app, "GET", "/openapi.json").text


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.", "127.0.0.2", "[::2]:80"]
)
def test_a_name_that_was_pointed_at_this_machine_is_refused(host: str) -> None:
    app = app_of()
    assert post(app, SCORES, asked(), Host=host).status_code == 400
    for name in ("localhost:1234", "LOCALHOST", "[::1]:80", "127.0.0.1"):
        assert post(app, SCORES, asked(), Host=name).status_code == 200
    assert post(app_of(hosts=("models.test",)), SCORES, asked(), Host="models.test").is_success


def test_pages_of_other_sites_get_nothing() -> None:
    app, page = app_of(), {"Origin": "https://evil.example"}
    preflight = call(app, "OPTIONS", SCORES, headers=page)
    assert preflight.status_code == 405
    plain = {**page, "Content-Type": "text/plain"}  # what a page may send without being asked
    simple = call(app, "POST", SCORES, content=json.dumps(asked()), headers=plain)
    assert simple.status_code == 422
    answers = [preflight, simple, call(app, "GET", "/usage", headers=page)]
    assert not [name for a in answers for name in a.headers if name.startswith("access-control")]
    assert usage(app)["billed"] == 0


# -- how much -------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory of this process, which holds the server."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def flood(connection: socket.socket, size: int, *, chunked: bool) -> tuple[int, int]:
    """Send zeros until all are sent or the server has closed: (bytes sent, most memory)."""
    zeros, sent, most = bytes(MIB), 0, 0
    frame = b"%x\r\n%s\r\n" % (MIB, zeros) if chunked else zeros
    try:
        while sent < size:
            connection.sendall(frame)
            sent += MIB
            most = max(most, resident())
    except ConnectionError:
        pass
    return sent, most


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
@pytest.mark.parametrize("token", [None, Secret(TOKEN)], ids=["open", "no token"])
def test_a_gigabyte_is_cut_off(*, chunked: bool, token: Secret | None) -> None:
    length = {"transfer_encoding": "chunked"} if chunked else {"content_length": 1024 * MIB}
    with attacked(most_bytes=4 * MIB, token=token) as url, connect(url) as connection:
        before = resident()
        connection.sendall(head(**length))
        sent, most = flood(connection, 1024 * MIB, chunked=chunked)
        assert sent < 64 * MIB
        assert most - before < 64 * MIB
        answer = read_to_end(connection)
        assert not answer or status_of(answer) == (413 if token is None else 401)


def test_a_body_slightly_too_large_is_told_so_and_keeps_its_connection() -> None:
    with attacked(most_bytes=MIB) as url, httpx.Client() as client:
        refused = client.post(url + SCORES, content=b"x" * (MIB + 1))
        assert refused.status_code == 413
        assert "connection" not in refused.headers
        assert client.get(f"{url}/usage").json()["refused"] == 1


def test_a_get_has_hardly_a_body() -> None:
    assert call(app_of(), "GET", "/usage", content=bytes(64 * 1024)).status_code == 200
    assert call(app_of(), "GET", "/usage", content=bytes(64 * 1024 + 1)).status_code == 413


def test_ten_thousand_labels_are_refused() -> None:
    labels = [f"label {index}" for index in range(10_000)]
    app = app_of()
    assert post(app, SCORES, asked(texts=labels)).status_code == 422
    hugging_face = {"inputs": encoded(), "parameters": {"candidate_labels": labels}}
    assert post(app, "/hf", hugging_face).status_code == 422
    tensors = [
        {"name": "image", "shape": [1], "datatype": "BYTES", "data": [encoded()]},
        {"name": "prompts", "shape": [10_000], "datatype": "BYTES", "data": labels},
    ]
    assert post(app, "/v2/models/linear-world-1/infer", {"inputs": tensors}).status_code == 422
    embeddings = app_of(world(Access.EMBEDDINGS))
    many = {"model": "linear-world-1", "input": labels}
    assert post(embeddings, "/v1/embeddings", many).status_code == 422
    assert (usage(app)["billed"], usage(embeddings)["billed"]) == (0, 0)


def test_a_long_label_and_many_images_are_refused() -> None:
    app = app_of()
    assert post(app, SCORES, asked(texts=["x" * 1001, "dog"])).status_code == 422
    assert post(app, SCORES, asked(images=[encoded()] * 1025)).status_code == 422
    limited = app_of(world(images_per_request=2))
    refused = post(limited, SCORES, asked(images=[encoded()] * 3))
    assert (refused.status_code, "takes 2" in refused.text) == (422, True)


def bomb(side: int) -> str:
    """A PNG of white pixels, small on the wire and large in memory."""

    def part(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return len(data).to_bytes(4, "big") + name + data + crc.to_bytes(4, "big")

    size = side.to_bytes(4, "big") * 2
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    parts = [(b"IHDR", size + b"\x01\x00\x00\x00\x00"), (b"IDAT", rows), (b"IEND", b"")]
    return encoded(b"\x89PNG\r\n\x1a\n" + b"".join(part(*p) for p in parts))


def test_pixels_are_bounded_in_each_picture_and_in_all() -> None:
    app = app_of(most_pixels=1_000_000)
    assert post(app, SCORES, asked(images=[bomb(800)])).status_code == 200
    refused = post(app, SCORES, asked(images=[bomb(800), bomb(808)]))
    assert refused.status_code == 422
    assert "1000000 pixels" in refused.text
    assert post(app_of(), SCORES, asked(images=[bomb(9000)])).status_code == 422


@pytest.mark.parametrize(
    "data",
    [b"\0", b"text", b"GIF89a", picture()[:60], b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"],
    ids=range(6),
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    app = app_of()
    refused = post(app, SCORES, asked(images=[encoded(), encoded(data)]))
    assert refused.status_code == 422
    assert "image 1" in refused.text
    assert "/tmp" not in refused.text


def test_base64_is_taken_literally() -> None:
    app = app_of()
    for spoilt in ("!" + encoded(), encoded() + "\n", encoded().rstrip("="), "é"):
        refused = post(app, SCORES, asked(images=[spoilt]))
        assert (refused.status_code, "base64" in refused.text) == (422, True)


def test_nothing_is_left_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []

    class Looking(LinearWorld):
        async def answer(self, requests: Sequence[Request]) -> list[Answer]:
            seen.extend(path.stat().st_mode & 0o777 for path in tmp_path.iterdir())
            return await super().answer(requests)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    app = app_of(Looking())
    assert post(app, SCORES, asked()).status_code == 200
    assert post(app, SCORES, asked(images=[encoded(b"text")])).status_code == 422
    assert seen == [0o700]
    assert not list(tmp_path.iterdir())


def test_an_image_is_never_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/cat.png"
        assert post(app_of(), SCORES, asked(images=[url])).status_code == 422
        embeddings = app_of(world(Access.EMBEDDINGS))
        content = {"model": "linear-world-1", "input": url, "modality": "image"}
        assert post(embeddings, "/v1/embeddings", content).status_code == 422
        with pytest.raises(BlockingIOError):
            trap.accept()


BODIES = [
    b"",
    b"{",
    b"\xff\xfe",
    b'{"texts": NaN}',
    b'{"texts": 1e999}',
    b'{"images": [], "images": []}',
    b"[" * 200_000,
    b'{"id": ' + b"9" * 5000 + b"}",
    b'{"images": ["\\ud800"], "texts": ["\\ud800"]}',
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_hostile_json_is_refused(body: bytes) -> None:
    json_type = {"Content-Type": "application/json"}
    refused = call(app_of(), "POST", SCORES, content=body, headers=json_type)
    assert refused.status_code in (400, 422)


def test_a_name_twice_and_a_deep_part_spoil_a_good_request() -> None:
    good = json.dumps(asked())
    headers = {"Content-Type": "application/json"}
    twice = '{"texts": ["other"], ' + good[1:]
    assert call(app_of(), "POST", SCORES, content=twice, headers=headers).status_code == 400
    deep = json.dumps({"inputs": encoded(), "parameters": {"candidate_labels": ["a"]}, "x": 0})
    spoilt = deep[:-2] + "[" * 40 + "]" * 40 + "}"
    assert call(app_of(), "POST", "/hf", content=deep, headers=headers).status_code == 200
    assert call(app_of(), "POST", "/hf", content=spoilt, headers=headers).status_code == 400


# -- how fast -------------------------------------------------------------------------------


def test_headers_that_never_end_close_the_connection() -> None:
    with attacked(header_seconds=0.3) as url, connect(url) as connection:
        started = time.monotonic()
        connection.sendall(b"POST /blackbox/v1/scores HTTP/1.1\r\n")
        try:
            while time.monotonic() - started < 5:
                connection.sendall(b"x-drip: 1\r\n")
                time.sleep(0.05)
        except ConnectionError:
            pass
        assert 0.25 < time.monotonic() - started < 3


def test_a_connection_that_says_nothing_is_closed() -> None:
    with attacked(header_seconds=0.2) as url, connect(url) as connection:
        assert read_to_end(connection) == b""


def test_the_deadline_is_for_headers_and_not_for_pauses_between_requests() -> None:
    with attacked(header_seconds=0.2) as url, connect(url) as connection:
        request = b"GET /usage HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
        for _ in range(2):
            connection.sendall(request)
            answer = HTTPResponse(connection)
            answer.begin()
            assert (answer.status, len(answer.read()) > 0) == (200, True)
            answer.close()
            time.sleep(0.4)
        connection.sendall(request[:20])  # and then it runs again
        assert read_to_end(connection) == b""


def test_an_idle_connection_is_closed() -> None:
    with attacked(idle_seconds=0.2) as url, connect(url) as connection:
        connection.sendall(b"GET /usage HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert status_of(read_to_end(connection)) == 200


def test_a_body_that_drips_is_cut_off() -> None:
    with attacked(body_seconds=0.3) as url, connect(url) as connection:
        started = time.monotonic()
        connection.sendall(head(content_length=1000))
        try:
            while time.monotonic() - started < 5:
                connection.sendall(b" ")
                time.sleep(0.05)
        except ConnectionError:
            pass
        assert 0.25 < time.monotonic() - started < 3
    with attacked(body_seconds=0.2) as url, connect(url) as connection:
        connection.sendall(head(content_length=1000))
        answer = read_to_end(connection)
        assert status_of(answer) == 408
        assert b"connection: close" in answer.lower()


def test_a_caller_who_leaves_in_the_middle_is_not_answered_or_billed() -> None:
    body = json.dumps(asked()).encode()
    with attacked() as url:
        with connect(url) as connection:
            connection.sendall(head(transfer_encoding="chunked"))
            connection.sendall(b"%x\r\n%s\r\n" % (len(body), body))  # whole, but not ended
        time.sleep(0.1)
        assert httpx.get(f"{url}/usage").json()["billed"] == 0


class Wide(LinearWorld):
    """Long answers."""

    def values(self, request: Request) -> Any:
        return super().values(request).repeat(1000, axis=1)


def test_an_answer_that_nobody_reads_is_dropped() -> None:
    backend = Wide(world(Access.EMBEDDINGS).capabilities)
    body = json.dumps({"texts": ["text"] * 60}).encode()
    with running_server(backend, ServerSettings(idle_seconds=0.2)) as url:
        with connect(url) as connection:
            connection.sendall(head("/blackbox/v1/text-embeddings", content_length=len(body)))
            connection.sendall(body)
            until_billed(url)
            time.sleep(0.6)
            received, _, part = read_to_end(connection).partition(b"\r\n\r\n")
        assert b" 200 " in received
        assert len(part) < 60 * 16_000 * 8
        assert httpx.get(f"{url}/usage").status_code == 200


def until_billed(url: str) -> None:
    for _ in range(500):
        if httpx.get(f"{url}/usage").json()["billed"]:
            return
        time.sleep(0.02)
    raise AssertionError("nothing was billed")


# -- how many -------------------------------------------------------------------------------


class Patient(LinearWorld):
    """Works on its first request until the end of the test."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        assert self.go_on.wait(20)
        return await super().answer(requests)


def test_two_hundred_at_once_are_served_or_told_to_come_back() -> None:
    backend = Patient()

    async def crowd(url: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as client:
            sent = [asyncio.create_task(client.post(SCORES, json=asked())) for _ in range(200)]
            while sum(task.done() for task in sent) < 196:
                await asyncio.sleep(0.01)
            backend.go_on.set()
            return await asyncio.gather(*sent)

    with attacked(backend, concurrency=4) as url:
        answers = run_sync(crowd(url))
        assert Counter(answer.status_code for answer in answers) == {200: 4, 429: 196}
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        counted = httpx.get(f"{url}/usage").json()
        assert (counted["billed"], counted["refused"]) == (4, 196)


def test_connections_are_counted() -> None:
    with attacked(most_connections=4, header_seconds=60) as url:
        held = [connect(url) for _ in range(4)]
        with connect(url) as fifth:
            assert read_to_end(fifth) == b"", "a timeout says that it is still open"
        for connection in held:
            connection.close()
        time.sleep(0.1)


# -- in which form --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        head(x_long="x" * 100_000),
        b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: 1\r\n" % i for i in range(10_000)) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
        head(content_length=-1),
        head(content_length=5, transfer_encoding="chunked") + b"zz\r\n\r\n",
        head(transfer_encoding="chunked") + b"ffffffffffffffffffffffff\r\n",
        b"POST http://[::1 HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    ],
    ids=range(7),
)
def test_broken_framing_is_refused(sent: bytes) -> None:
    with attacked(header_seconds=0.5, body_seconds=0.5) as url, connect(url) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        answer = read_to_end(connection)
        assert not answer or status_of(answer) in (400, 431)


def test_an_upgrade_is_not_taken() -> None:
    with attacked() as url:
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        assert httpx.get(f"{url}/usage", headers=headers).status_code == 200


def test_the_same_offset_bytes_are_wanted(tmp_path: Path) -> None:
    soft = app_of(world(Access.SOFT))

    def ask(shape: list[int], data: bytes) -> int:
        offset = {"shape": shape, "data": base64.b64encode(data).decode()}
        content = {"images": [encoded()], "class_names": ["cat"], "template": "a {}"}
        return post(soft, "/blackbox/v1/prompt-scores", {**content, "offset": offset}).status_code

    assert ask([4, 6], bytes(96)) == 200
    assert {ask([4, 6], bytes(95)), ask([6, 4], bytes(96)), ask([4, 6, 1], bytes(96))} == {422}
    assert {ask([4, 6], b"\xff" * 96), ask([65536, 65536], bytes(96)), ask([0, 6], b"")} == {422}

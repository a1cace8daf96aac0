"""What strangers write, read with care: JSON, URLs, headers and keys; and pictures on their way."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import pickle
import time
import traceback
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from blackbox_vlm.backends import _images
from blackbox_vlm.backends._headers import quota, retry_after
from blackbox_vlm.backends._images import Uploads, encode, strip_jpeg
from blackbox_vlm.backends._json import MAX_DEPTH, MAX_DIGITS, parse_json
from blackbox_vlm.backends._url import Origin, parse_url
from hosted import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from blackbox_vlm.augment import augmented
from blackbox_vlm.backend import Quota
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image
from blackbox_vlm.secret import Secret

# -- JSON ---------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


@given(values)
def test_what_json_wrote_is_read(value: Any) -> None:
    if "inf" not in repr(value):
        for ascii_only in (True, False):
            body = json.dumps(value, ensure_ascii=ascii_only).encode()
            assert parse_json(body) == value


@given(st.binary() | st.text(alphabet='[]{}",:\\u0-1e.tN \n').map(str.encode))
def test_anything_else_is_a_value_error(body: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_json(body)
        json.loads(body)  # what we read, everybody reads


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "Expecting value at character 0"),
        (b"<html>", "Expecting value"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('["é"]'.encode("latin-1"), "not UTF-8"),
        ('["é"]'.encode("utf-16"), "not UTF-8"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "beyond float64"),
        (b"[-1e999]", "beyond float64"),
        (b'{"a": 1, "a": 1}', "twice"),
        (b'{"a": {"b": 1, "\\u0062": 2}}', "twice"),
        (b"7" * (MAX_DIGITS + 1), "digits"),
        (b"0." + b"7" * MAX_DIGITS, "digits"),
        (b"[" * 200_000, "nested"),
        (b'{"a":' * 200_000, "nested"),
        (b"]" * 9 + b"[" * 200_000, "nested"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested"),
        (b"[1] [2]", "Extra data"),
    ],
    ids=lambda part: repr(part)[:24],
)
def test_what_is_no_json_for_us(body: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(body)


def test_limits_are_reached_without_harm() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert parse_json(b"7" * MAX_DIGITS) == int("7" * MAX_DIGITS)
    brackets = json.dumps(['[[[["\\' * 100, {"{{{": "]"}]).encode()
    assert parse_json(brackets)[0] == '[[[["\\' * 100
    assert math.copysign(1, parse_json(b"-0.0")) == -1


def test_a_long_hostile_body_is_read_in_linear_time() -> None:
    began = time.perf_counter()
    for unit in (b'"', b"\\", b'\\"', b'["\\', b"[]"):
        with pytest.raises(ValueError, match=r".+"):
            parse_json(b'["' + unit * (2**20 // len(unit)))
    assert time.perf_counter() - began < 5


# -- URLs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "origin", "path", "query"),
    [
        ("https://api.example", "https://api.example", "", ""),
        ("HTTPS://API.Example:443/v1/", "https://api.example", "/v1", ""),
        ("https://api.example:8443/v1?a=b/c", "https://api.example:8443", "/v1", "?a=b/c"),
        ("https://bücher.example/a", "https://xn--bcher-kva.example", "/a", ""),
        ("https://ＡＰＩ.example", "https://api.example", "", ""),
        ("https://api.example:0", "https://api.example:0", "", ""),
        ("http://127.0.0.1:80", "http://127.0.0.1", "", ""),
        ("http://127.8.8.8:8000", "http://127.8.8.8:8000", "", ""),
        ("http://localhost:8000/x", "http://localhost:8000", "/x", ""),
        ("http://[::1]:8000", "http://[::1]:8000", "", ""),
        ("https://[2001:DB8::1]/", "https://[2001:db8::1]", "", ""),
        ("https://api.example/models/a@b:c", "https://api.example", "/models/a@b:c", ""),
    ],
)
def test_a_url(url: str, origin: str, path: str, query: str) -> None:
    found, *rest = parse_url(url)
    assert str(found) == origin
    assert rest == [path, query]
    assert parse_url(origin + path + query) == (found, path, query)


def test_an_origin_has_parts() -> None:
    assert parse_url("http://[::1]/x")[0] == Origin("http", "::1", 80)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.example",
        "//api.example",
        "file:///etc/passwd",
        "ftp://api.example",
        "https:api.example",
        "https:///v1",
        "https://",
        "http://api.example",
        "http://169.254.169.254/latest",
        "http://0.0.0.0:8000",
        "http://localhost.evil.example",
        "https://api.example:99999",
        "https://api.example:port",
        "https://api.example#fragment",
        "https://api.example/a b",
        "https://api.example/a\nb",
        "https://api.example\\@evil.example",
        "https://api.example/\u202e",
        "https://[fe80::1%25eth0]",
        "https://[::1",
        "https://[127.0.0.1]",
        "https://2130706433",
        "https://0x7f000001",
        "https://127.1",
        "https://127.0.0.0x1",
        "https://127.0.0.1.",
        "https://１２７.0.0.1.example。1",
        "https://a..b",
        "https://-a.example",
        "https://a_b!.example",
        "https://" + "a" * 64 + ".example",
    ],
)
def test_a_url_that_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="endpoint's URL"):
        parse_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hidden@api.example",
        "https://hidden@api.example",
        "https://user:hid den@api.example",
        "https://user:hidden\\@api.example",
        "ftp://user:hidden@api.example:99999",
        "https:user:hidden@api.example",
        "https:\\\\user:hidden@api.example",
        "//user:hidden@api.example",
        "ftp://api.example?key=hidden",
        "http://api.example#hidden",
    ],
)
def test_no_refusal_repeats_a_secret(url: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_url(url)
    assert "hidden" not in str(caught.value)


# -- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "3600"}, 3600.0),
        *(({"retry-after": bad}, None) for bad in ("inf", "nan", "-1", "+1", "1e3", "1_000")),
        *(({"retry-after": bad}, None) for bad in ("", "soon", "٣", "1" * 10, "2\n3", "0x10")),
        ({"retry-after": "Sun, 22 Nov 2026 10:00:09 GMT", "date": "x"}, None),
        ({"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, None),
        ({"retry-after": "Mon, 01 Jan 2026 00:00:00 +99999999999999999999"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    if seconds is None and "date" in headers:  # falls back on our own clock
        assert retry_after(headers) is not None
    else:
        assert retry_after(headers) == seconds


@pytest.mark.parametrize(("then", "seconds"), [("10:00:09", 9.0), ("09:00:00", 0.0)])
def test_a_date_is_read_by_the_clock_of_who_sent_it(then: str, seconds: float) -> None:
    headers = {
        "retry-after": f"Sun, 22 Nov 2020 {then} GMT",
        "date": "Sun, 22 Nov 2020 10:00:00 GMT",
    }
    assert retry_after(headers) == seconds


def test_a_date_without_another_is_read_by_our_clock() -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    wait = retry_after({"retry-after": then})
    assert wait is not None
    assert 25 < wait <= 30


@given(st.text(max_size=40) | st.from_regex(r"[A-Za-z]{3}, [0-9]{1,30} [A-Z][a-z]{2} [0-9 :+-]*"))
def test_no_header_makes_it_fall(text: str) -> None:
    names = ("retry-after", "retry-after-ms", "date", "ratelimit")
    resets = ("ratelimit-reset", "x-ratelimit-reset", "x-ratelimit-reset-requests")
    left = {name.replace("reset", "remaining"): "1" for name in resets}
    headers = dict.fromkeys(names + resets, text) | left
    wait, found = retry_after(headers), quota(headers)
    assert wait is None or 0 <= wait < math.inf
    assert found is None or 0 <= found.resets_in < math.inf


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"x-ratelimit-remaining": "5", "x-ratelimit-reset": "12"}, Quota(5, 12.0)),
        ({"ratelimit-remaining": "0", "ratelimit-reset": "55"}, Quota(0, 55.0)),
        ({"ratelimit": '"api";r=3;t=55'}, Quota(3, 55.0)),
        ({"ratelimit": '"api"; t = 55; q=9; r = 3'}, Quota(3, 55.0)),
        ({"ratelimit": '"api";r=3'}, None),
        ({"ratelimit": '"api";r=-3;t=5'}, None),
        ({"x-ratelimit-remaining": "5"}, None),
        ({"x-ratelimit-remaining": "5", "x-ratelimit-reset": "1795341600"}, None),
        ({"x-ratelimit-remaining": "5", "x-ratelimit-reset": "999999999"}, None),
        ({"x-ratelimit-remaining": "-5", "x-ratelimit-reset": "12"}, None),
    ],
)
def test_quota(headers: dict[str, str], expected: Quota | None) -> None:
    assert quota(headers) == expected


@pytest.mark.parametrize(
    ("reset", "seconds"),
    [("1s", 1), ("6m0s", 360), ("20ms", 0.02), ("1h2m3.5s", 3723.5), ("1.5m", 90), ("2m", 120)],
)
def test_durations(reset: str, seconds: float) -> None:
    headers = {"x-ratelimit-remaining-requests": "9", "x-ratelimit-reset-requests": reset}
    assert quota(headers) == Quota(9, seconds)


@pytest.mark.parametrize("reset", ["", "s", "1", "m", "1s1m", "9" * 400 + "h", "٣s", "-1s"])
def test_durations_that_are_none(reset: str) -> None:
    headers = {"x-ratelimit-remaining-requests": "9", "x-ratelimit-reset-requests": reset}
    found = quota(headers)
    assert found == (Quota(9, 1.0) if reset == "1" else None)


# -- keys ---------------------------------------------------------------------------------------

KEY = 'sk-planted/4f9a+7c=="x'


def test_a_key_is_shown_nowhere() -> None:
    secret = Secret(KEY, prefix="Bearer ")
    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>40}", f"{[secret]}"]
    shown += [repr(getattr(secret, name)) for name in dir(secret)]
    shown += [repr(pickle.dumps(secret, protocol)) for protocol in range(6)]
    assert not [text for text in shown if KEY in text or "planted" in text]
    assert pickle.loads(pickle.dumps(secret)).reveal() == "***"
    assert secret.reveal() == f"Bearer {KEY}"
    with pytest.raises(TypeError):
        json.dumps(secret)
    assert "planted" not in repr(copy.deepcopy(secret))


def test_a_key_takes_the_prefix_of_its_header() -> None:
    secret = Secret(f" {KEY}\n")
    assert secret.reveal() == KEY
    assert secret.prefixed("Key ").reveal() == f"Key {KEY}"
    with pytest.raises(InputError, match="prefix"):
        secret.prefixed("Bearer\n")


def test_a_key_is_scrubbed_from_what_others_say() -> None:
    secret = Secret(KEY)
    said = f"no such key {KEY}, {json.dumps(KEY)}, " + json.dumps(KEY).replace("/", "\\/")
    assert secret.scrub(said) == 'no such key ***, "***", "***"'


def leak(error: BaseException) -> bool:
    """Whether an error shows the planted key: in its text, its causes, or the locals of a frame."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    error = error.with_traceback(frames)
    told = traceback.TracebackException.from_exception(error, capture_locals=True)
    hidden = error.__cause__ or error.__context__
    everything = "".join(told.format()) + repr(vars(error)) + repr(getattr(error, "object", ""))
    return "planted" in everything or (hidden is not None and leak(hidden))


BAD_KEYS = ["", " ", "planted key", "planted\nkey", "plantedключ", "planted\0", "planted\x7f"]


@pytest.mark.parametrize("text", BAD_KEYS)
def test_what_is_no_key_is_not_shown_either(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text(text, encoding="utf-8")
    file.chmod(0o600)
    places = [("the file", lambda: Secret.from_file(file))]
    if "\0" not in text:
        monkeypatch.setenv("SERVICE_KEY", text)
        places.append(("SERVICE_KEY", lambda: Secret.from_env("SERVICE_KEY")))
    for _, place in places:
        with pytest.raises(InputError, match=r"empty|not visible ASCII") as caught:
            place()
        assert not leak(caught.value)


def test_where_a_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_KEY", KEY)
    assert Secret.from_env("SERVICE_KEY").reveal() == KEY
    with pytest.raises(InputError, match="OTHER_KEY is not set"):
        Secret.from_env("OTHER_KEY")
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o600)
    assert Secret.from_file(file).reveal() == KEY
    for path in (tmp_path / "missing", tmp_path / "nul\0"):
        with pytest.raises(InputError, match="cannot read a key"):
            Secret.from_file(path)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o666])
def test_a_key_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(mode)
    with pytest.raises(InputError, match="chmod 600") as caught:
        Secret.from_file(file)
    assert not leak(caught.value)


def test_a_key_is_no_folder_and_no_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(InputError, match="no file that only you"):  # not: waits for who writes
        Secret.from_file(pipe)
    with pytest.raises(InputError, match="cannot read a key"):
        Secret.from_file(tmp_path)


# -- pictures -----------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def saved(path: Path, **options: Any) -> Image:
    PIL.Image.fromarray(PIXELS).save(path, **options)
    return Image.from_file(path)


def exif(orientation: int = 1) -> PIL.Image.Exif:
    data = PIL.Image.Exif()
    data[0x0112], data[0x010E] = orientation, "where I live"
    return data


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"restart_marker_blocks": 2},
        {"comment": b"private"},
        {"icc_profile": b"private" * 20_000},
        {"quality": 100, "subsampling": 0},
    ],
    ids=str,
)
def test_a_jpeg_goes_as_it_is_without_its_metadata(options: dict[str, Any], tmp_path: Path) -> None:
    image = saved(tmp_path / "a.jpg", exif=exif(), **options)
    data = encode(image)
    assert data.startswith(b"\xff\xd8\xff")
    assert data.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(pixels(data), np.asarray(image.load()))
    assert b"where I live" not in data
    assert b"private" not in data
    assert not PIL.Image.open(io.BytesIO(data)).getexif()


def test_what_follows_the_end_of_a_jpeg_is_not_sent(tmp_path: Path) -> None:
    image = saved(tmp_path / "a.jpg")
    data = image.path.read_bytes()
    assert strip_jpeg(data + b"\xff\xd8 another picture, private") == strip_jpeg(data)
    assert strip_jpeg(strip_jpeg(data)) == strip_jpeg(data)


@given(st.binary(max_size=300).map(lambda tail: b"\xff\xd8\xff" + tail))
@settings(max_examples=50)
def test_no_jpeg_makes_it_fall(data: bytes) -> None:
    assert len(strip_jpeg(data)) <= len(data)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("turned.jpg", {"exif": exif(6)}),
        ("a.png", {"exif": exif()}),
        ("a.webp", {"lossless": True}),
        ("a.bmp", {}),
    ],
)
def test_other_pictures_go_as_png(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    image = saved(tmp_path / name, **options)
    data = encode(image)
    assert data.startswith(b"\x89PNG")
    np.testing.assert_array_equal(pixels(data), np.asarray(image.load()))
    assert b"where I live" not in data


def test_a_jpeg_in_cmyk_is_redrawn(tmp_path: Path) -> None:
    PIL.Image.fromarray(PIXELS).convert("CMYK").save(tmp_path / "cmyk.jpg")
    image = Image.from_file(tmp_path / "cmyk.jpg")
    data = encode(image)
    assert data.startswith(b"\x89PNG")
    np.testing.assert_array_equal(pixels(data), np.asarray(image.load()))


def test_a_jpeg_that_cannot_be_opened_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="damaged header"):
        encode(saved(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*" + b"\xff" * 20))


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    image = saved(tmp_path / "a.jpg")
    assert pixels(encode(image, max_side=20)).shape == (15, 20, 3)
    assert encode(image, max_side=40) == encode(image)


def test_a_picture_that_changed_is_not_sent(tmp_path: Path) -> None:
    image = saved(tmp_path / "a.png")
    saved(tmp_path / "a.png", compress_level=0)
    with pytest.raises(InputError, match="has changed"):
        encode(image)
    with pytest.raises(InputError):
        encode(replace(image, path=tmp_path / "missing.png"))


def test_uploads_are_encoded_once_and_named(tmp_path: Path, monkeypatch: Any) -> None:
    first, second = saved(tmp_path / "a.jpg"), saved(tmp_path / "b.png")
    uploads = Uploads()
    assert uploads.data_uri(first).startswith("data:image/jpeg;base64,/9j/")
    assert uploads.data_uri(second).startswith("data:image/png;base64,iVBOR")
    data = base64.b64decode(uploads.base64(first))
    assert hashlib.sha256(data).digest() == hashlib.sha256(encode(first)).digest()
    monkeypatch.setattr(_images, "encode", lambda *_: pytest.fail("encoded again"))
    uploads.base64(first)
    uploads.base64(second)


def test_only_so_many_uploads_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    pictures = []
    for index in range(4):
        PIL.Image.fromarray(PIXELS + np.uint8(index)).save(tmp_path / f"{index}.png")
        pictures.append(Image.from_file(tmp_path / f"{index}.png"))
    uploads = Uploads()
    monkeypatch.setattr(_images, "CACHE_BYTES", 2 * len(uploads.base64(pictures[0])) + 100)
    uploads.base64(pictures[1])
    uploads.base64(pictures[0])  # the last used is kept, not the last encoded
    uploads.base64(pictures[2])
    encoded: list[Path] = []
    monkeypatch.setattr(_images, "encode", lambda image, _: encoded.append(image.path) or b"again")
    for picture in (pictures[0], pictures[2], pictures[1]):
        uploads.base64(picture)
    assert encoded == [pictures[1].path]


def test_a_view_of_a_picture_is_sent_as_it_looks(tmp_path: Path) -> None:
    [original] = noise(tmp_path, 1)
    view = augmented(original, 0)
    sent = PIL.Image.open(io.BytesIO(encode(view)))
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(view.load()))

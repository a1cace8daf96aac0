"""Endpoint files: what they may hold, and how they can be wrong; nothing is sent."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from blackbox_vlm.backend import Access, Backend, Price, ScoreKind
from blackbox_vlm.endpoint import MOST_BYTES, Endpoint, closing, open_endpoint
from blackbox_vlm.errors import InputError
from blackbox_vlm.running import run_sync
from blackbox_vlm.settings import Settings

EXAMPLES = Path(__file__).parent.parent / "examples"
GOOD = """\
protocol = "zero-shot"
url = "https://example.org/models/clip"
model = "clip"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "endpoint.toml"


def refused(file: Path, text: str | bytes) -> str:
    """The message that a text is refused with; it names the file and stays on one line."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        open_endpoint(file)
    message = str(caught.value)
    assert "endpoint.toml" in message
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def test_every_key_but_the_protocol_is_an_option(file: Path) -> None:
    file.write_text(
        GOOD + 'score_kind = "sigmoid"\ndecimals = 4\nconcurrency = 8\n[price]\nper_image = 0.01\n'
    )
    with closing(open_endpoint(file)) as backend:
        said = backend.capabilities
    assert (said.access, said.score_kind) == (Access.SCORES, ScoreKind.SIGMOID)
    assert (said.model_id, said.decimals, said.concurrency) == ("clip", 4, 8)
    assert said.price == Price(per_image=0.01)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('url = "https://example.org"', "protocol is missing; wanted one of blackbox, chat, "),
        ("protocol = 3", "protocol is 3; wanted one of"),
        ('protocol = ""', "protocol is ''"),
        ('protocol = "carrier-pigeon"', "unknown backend 'carrier-pigeon'; installed: blackbox, "),
        ('protocol = "zero-shot"\nmodel = "clip"', "lacks url"),
        (GOOD + "wings = 2", "unknown option wings; this protocol takes url, model"),
        (GOOD + 'inner = "x"', "unknown option inner"),
        (GOOD + "timeout = -1", "timeout is -1: "),
        (GOOD + 'score_kind = "vibes"', "score_kind is 'vibes': "),
        (GOOD + '[price]\nper_request = "cheap"', "price.per_request is 'cheap': "),
        (GOOD + "[price]\nper_click = 1", "unknown option price.per_click"),
        (GOOD + 'key_env = "NOT_SET_ANYWHERE"', "NOT_SET_ANYWHERE is not set"),
        (GOOD.replace("https", "http"), "http is for this machine only"),
        ("protocol =", "is no TOML: "),
        ("a = 1\na = 2", "is no TOML: "),
        (b"\xff\xfe", "it is not UTF-8"),
        ("a = " + "[" * 20_000, "is no TOML: "),
        ("# " + "x" * MOST_BYTES, f"more than {MOST_BYTES} bytes"),
        ("", "empty"),
        ('protocol = "local"\nurl = "https://example.org"', "url"),
    ],
)
def test_what_is_wrong_is_named(file: Path, text: str | bytes, said: str) -> None:
    assert said in refused(file, text)


def test_a_key_in_the_file_itself_is_refused_and_not_shown(file: Path) -> None:
    assert "s3cret" not in refused(file, GOOD + 'key = "s3cret"')


def test_no_file_a_folder_and_a_pipe(file: Path) -> None:
    with pytest.raises(InputError, match=r"endpoint\.toml"):
        open_endpoint(file)
    os.mkfifo(file)
    with pytest.raises(InputError, match="regular file"):
        open_endpoint(file)
    with pytest.raises(InputError, match="regular file"):
        open_endpoint(file.parent)


def test_files_beside_it_are_found_from_any_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file.parent / "keys").mkdir()
    key = file.parent / "keys" / "key"
    key.write_text("s3cret")
    file.write_text(GOOD + 'key_file = "keys/key"\nca_file = "ca.pem"')
    monkeypatch.chdir("/")
    options = Endpoint.from_file(file).options
    assert options["key_file"] == str(key)
    assert options["ca_file"] == str(file.parent / "ca.pem")
    assert "run chmod 600" in refused(file, GOOD + 'key_file = "keys/key"')
    key.chmod(0o600)
    open_endpoint(file)


def test_paths_that_are_no_relative_ones_stay(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    file.write_text(GOOD + 'key_file = "~/key"\nca_file = "/etc/ca.pem"')
    options = Endpoint.from_file(file).options
    assert (options["key_file"], options["ca_file"]) == ("/home/someone/key", "/etc/ca.pem")


def test_every_example_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(EXAMPLES.glob("*.toml"))
    assert files
    for example in files:
        endpoint = Endpoint.from_file(example)
        if "key_env" in endpoint.options:
            monkeypatch.setenv(endpoint.options["key_env"], "s3cret")
        with closing(open_endpoint(example)) as backend:
            assert isinstance(backend, Backend)


plain = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    plain | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@limits(max_examples=60, deadline=None)
@given(st.dictionaries(texts.filter(lambda name: name not in ("protocol", "inner")), values))
def test_what_is_written_is_what_is_read(options: dict[str, Any]) -> None:
    text = Endpoint("zero-shot", options).to_toml()
    assert tomllib.loads(text) == {"protocol": "zero-shot", **options}


# -- as --backend -----------------------------------------------------------------------------


def settings(file: Path, **more: Any) -> Settings:
    return Settings(data="photos", budget=1, backend=str(file), **more)


@pytest.mark.parametrize(
    "more",
    [
        {"model": "nano"},
        {"pretrained": "openai"},
        {"device": "cpu"},
        {"access": "scores"},
        {"restrict": ("decimals=4",)},
    ],
)
def test_options_that_would_be_ignored_are_refused(file: Path, more: dict[str, Any]) -> None:
    file.write_text(GOOD)
    with closing(settings(file).open_backend()) as backend:
        assert backend.capabilities.model_id == "clip"
    [name] = more
    with pytest.raises(InputError, match=f"--{name} is for the local backend.*endpoint.toml"):
        settings(file, **more).open_backend()


def test_a_url_is_no_backend_and_is_not_repeated() -> None:
    with pytest.raises(InputError, match=r"write endpoint\.toml") as caught:
        Settings(data="photos", budget=1, backend="https://example.org?key=s3cret").open_backend()
    assert "s3cret" not in str(caught.value)


def test_backends_are_closed_whatever_happens() -> None:
    class Closing:
        closed = 0

        async def aclose(self) -> None:
            self.closed += 1

    backend: Any = Closing()
    with closing(backend):
        assert not backend.closed
    assert backend.closed == 1
    with pytest.raises(KeyboardInterrupt), closing(backend):
        raise KeyboardInterrupt
    assert backend.closed == 2

    async def in_a_loop() -> None:  # as in a notebook
        with closing(backend):
            pass

    run_sync(in_a_loop())
    assert backend.closed == 3

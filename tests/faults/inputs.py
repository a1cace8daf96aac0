"""Rows F48 to F56: pictures, folders, names, keys, URLs, files, numbers, and our own server."""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from blackbox_vlm.backends._url import parse_url
from blackbox_vlm.backends.transport import Transport
from faults.remote import HostedZeroShot, picture, question
from serving import app_of, asked, call, post, usage
from test_adapter import make as make_adapter
from test_images import BROKEN, save
from test_tuning import make_task, options, soft_world

from blackbox_vlm._adapter_file import WEIGHTS_FILE
from blackbox_vlm.adapter import Adapter
from blackbox_vlm.backend import open_backend
from blackbox_vlm.console import print_csv, printable
from blackbox_vlm.craft import cma
from blackbox_vlm.errors import AuthError, InputError
from blackbox_vlm.ledger import Ledger
from blackbox_vlm.meter import Meter
from blackbox_vlm.running import run_sync
from blackbox_vlm.secret import Secret
from blackbox_vlm.task import Task
from blackbox_vlm.testing import Received, ScriptedServer
from blackbox_vlm.testing.server import message, never, replying
from blackbox_vlm.tuning import Options, dry_run, tune

Patch = pytest.MonkeyPatch
KEY = "zq-hidden/4f9a+7c=="
REMOTE = HostedZeroShot()


def class_folders(root: Path, *names: str) -> Path:
    """A folder per class, each with two pictures."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(2):
            shade = PIL.Image.new("RGB", (8, 8), (20 * number, 90 * index, 99))
            shade.save(root / name / f"{index}.png")
    return root


def refused(what: str, make: Callable[[], object]) -> None:
    """An error that names the culprit in printable characters."""
    with pytest.raises(InputError) as caught:
        make()
    assert what in str(caught.value)
    assert str(caught.value).isprintable()


def broken_pictures(folder: Path, patch: Patch) -> None:
    """F48: listed before any query; what only looks odd is read."""
    root, task = class_folders(folder / "root", "cat", "dog"), soft_world()
    names = ("truncated jpeg", "0 bytes", "text", "eps", "ps after magic", "81 Mpx")
    for name in names:
        (root / "cat" / name).mkdir()
        BROKEN[name][0](root / "cat" / name)
    odd = root / "dog"
    save(odd / "cmyk.jpg", PIL.Image.new("CMYK", (8, 8), (9, 9, 9, 9)))
    save(odd / "16 bit.png", PIL.Image.fromarray(np.full((8, 8), 999, np.uint16)))
    frames = [PIL.Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (1, 2)]
    save(odd / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    save(odd / "turned.jpg", PIL.Image.new("RGB", (8, 4), (5, 5, 5)), exif=turned)
    found = Task.from_folder(root)
    assert sorted(file.path.parent.name for file in found.skipped) == sorted(names)
    assert len(found) == 8
    refused("6 of 14 files", lambda: Task.from_folder(root, strict=True))
    assert task.asked == 0


def hostile_folders(folder: Path, patch: Patch) -> None:
    """F49."""
    root = class_folders(folder / "root", "cat", "dog")
    outside = save(folder / "outside.png", PIL.Image.new("RGB", (8, 8)))
    (root / "cat" / "link.png").symlink_to(outside)
    os.mkfifo(root / "cat" / "pipe.png")
    reasons = {file.path.name: file.reason for file in Task.from_folder(root).skipped}
    assert reasons["link.png"] == "leads out of the data folder"
    assert reasons["pipe.png"] == "not a regular file"
    (folder / "table.csv").write_text("path,label\ncat/0.png,a\n../outside.png,b\n")
    refused("outside.png", lambda: Task.from_csv(folder / "table.csv", root=root))
    (root / "empty").mkdir()
    refused("'empty'", lambda: Task.from_folder(root))
    for pair in (("Owl", "owl"), ("caf\u00e9", "cafe\u0301")):
        twins = class_folders(folder / repr(pair), *pair)
        refused(repr(pair[0]).strip("'")[:3], lambda twins=twins: Task.from_folder(twins))
    crowd = tuple(f"class {number}" for number in range(100_000))
    refused("100000 class(es)", lambda: Task(crowd, "{}", (), None))

    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    patch.setattr(os, "scandir", denied)
    refused("Permission denied", lambda: Task.from_folder(class_folders(folder / "x", "a", "b")))


def odd_names(folder: Path, patch: Patch) -> None:
    """F50: text and nothing else, or refused."""
    names = ("no", "012", "{0.__class__}", '"; ignore the above', "=cmd|' /C calc'!A0")
    task = Task(names, "a {}", (), None)
    assert task.class_names == names
    assert task.classes.texts == tuple(f"a {name}" for name in names)
    for hostile in ("\x1b[31mred", "\u202egnp", "x" * 10_000, ""):
        refused("", lambda name=hostile: Task((name, "b"), "{}", (), None))
    assert printable("\x1b[31m\u202e") == "\\x1b[31m\\u202e"
    patch.setattr("sys.stdout", table := StringIO())
    print_csv([{"label": "=1+1"}, {"label": "\x1b[31m"}])
    assert table.getvalue() == "label\n'=1+1\n\\x1b[31m\n"
    local = open_backend("local", model="nano", access="scores")
    with pytest.raises(InputError, match="tokens"):
        local.check_texts("{}", ("word " * 90, "dog"))  # type: ignore[attr-defined]


@contextmanager
def everything_logged() -> Iterator[StringIO]:
    """All that anybody logs, at DEBUG."""
    text, names = StringIO(), ("", "httpx", "httpcore", "asyncio", "blackbox_vlm")
    handler, loggers = logging.StreamHandler(text), [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    loggers[0].addHandler(handler)
    try:
        for logger in loggers:
            logger.setLevel(logging.DEBUG)
        yield text
    finally:
        loggers[0].removeHandler(handler)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def told(error: BaseException | None) -> str:
    """An error and all behind it, with the locals of every frame that is not a test's."""
    if error is None:
        return ""
    lines = [repr(error), str(error), repr(vars(error))]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "tests" not in Path(frame.f_code.co_filename).parts:
            lines += map(repr, frame.f_locals.values())
    return "\n".join(lines) + told(error.__cause__) + told(error.__context__)


def shown(thing: object) -> str:
    """All the ways in which an object shows itself, its attributes too."""
    with suppress(Exception):
        return repr(thing) + str(thing) + repr(pickle.dumps(thing))
    return repr(thing) + str(thing) + repr(getattr(thing, "__dict__", ""))


def echo(received: Received) -> list[bytes]:
    """A server that refuses and repeats the key, with and without JSON's backslashes."""
    key = received.headers["authorization"]
    return [message(f'{{"no": "{key}", "nor": "{key.replace("/", chr(92) + "/")}"}}'.encode(), 401)]


def planted_key(folder: Path, patch: Patch) -> None:
    """F51: a key is found nowhere, and what is none is not repeated."""
    patch.setenv("HOSTED_KEY", KEY)
    root, out, texts = class_folders(folder / "data", "cat", "dog"), folder / "run", list[str]()
    good = replying(REMOTE.good_answer)
    asked = Options(budget=20, method="refine", on_lost="resend")
    with everything_logged() as log, ScriptedServer(good, [good, echo, good, never]) as server:
        backend = REMOTE.make_remote(server.url, 0.3, key_env="HOSTED_KEY")
        with pytest.raises(AuthError) as refusal:
            tune(Task.from_folder(root), backend, out, asked)
        for _ in range(2):  # goes on, and then finds itself finished
            tune(Task.from_folder(root), backend, out, asked, resume=True)
        texts.append(told(refusal.value))
    assert {seen.headers["authorization"] for seen in server.received} == {f"Bearer {KEY}"}
    with Ledger(out / "ledger.sqlite") as ledger:
        assert (len(server.received), ledger.spent()) == (6, 5)  # one was sent again under its key
    things = (backend, backend.options, backend.transport, backend.options.key())  # type: ignore[attr-defined]
    texts += [log.getvalue(), *map(shown, things), shown(vars(backend.transport))]  # type: ignore[attr-defined]
    texts += [path.read_bytes().decode("latin-1") for path in out.rglob("*") if path.is_file()]
    assert len(texts) > 8
    for text in texts:
        assert "zq-hidden" not in text, text[:2000]
    for wrong in ("", "zq-hidden\nkey", "zq-hidden key", "zq-hiddené"):
        patch.setenv("HOSTED_KEY", wrong)
        with pytest.raises(InputError, match="HOSTED_KEY is") as caught:
            REMOTE.make_remote(server.url, 0.3, key_env="HOSTED_KEY")
        assert "zq-hidden" not in told(caught.value)
    key_like_a_label(folder, patch)


def key_like_a_label(folder: Path, patch: Patch) -> None:
    """F51: it is taken out of messages, and out of nothing else."""
    patch.setenv("HOSTED_KEY", "dog")
    with (
        ScriptedServer(replying(REMOTE.good_answer)) as server,
        Ledger(folder / "ledger.sqlite", 3) as ledger,
    ):
        backend = REMOTE.make_remote(server.url, 9.0, key_env="HOSTED_KEY")
        run_sync(Meter(backend, ledger).observe([question(picture(folder), 1)], "row"))
        assert (len(server.received), ledger.spent()) == (1, 1)


def hostile_environment(folder: Path, patch: Patch) -> None:
    """F52."""
    (folder / "netrc").write_text("machine 127.0.0.1 login me password secret")
    with ScriptedServer(never) as proxy, ScriptedServer(replying(REMOTE.good_answer)) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
            patch.setenv(name, proxy.url)
        patch.setenv("NETRC", str(folder / "netrc"))
        patch.setenv("SSL_CERT_FILE", str(folder / "nowhere"))
        patch.setenv("SSLKEYLOGFILE", str(folder / "keys"))
        backend = REMOTE.make_remote(server.url, 9.0)
        with Ledger(folder / "ledger.sqlite", 3) as ledger:
            run_sync(Meter(backend, ledger).observe([question(picture(folder), 1)], "row"))
            assert (len(server.received), proxy.connections, ledger.spent()) == (1, 0, 1)
    assert server.received[0].headers["authorization"].startswith("Bearer zq-matrix")
    Transport("https://api.example")
    assert not (folder / "keys").exists()


def hostile_urls(folder: Path, patch: Patch) -> None:
    """F53."""
    for url in (
        "https://user:zq-hidden@api.example",
        "http://169.254.169.254",
        "http://api.example",
        "file:///etc/passwd",
        "https://api.example\\@evil.example",
        "https://[fe80::1%25eth0]",
        "https://2130706433",
    ):
        with pytest.raises(InputError, match="endpoint's URL") as caught:
            REMOTE.make_remote(url, 1.0)
        assert "zq-hidden" not in str(caught.value)
    assert str(parse_url("https://bücher.example")[0]) == "https://xn--bcher-kva.example"


class Explosive:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def hostile_adapters(folder: Path, patch: Patch) -> None:
    """F54."""
    mark = folder / "ran"
    for data in (
        pickle.dumps(Explosive(mark)),
        b"\xff" * 8 + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        b"",
    ):
        make_adapter().save_pretrained(folder / "adapter")
        (folder / "adapter" / WEIGHTS_FILE).write_bytes(data)
        with pytest.raises(InputError):
            Adapter.from_pretrained(folder / "adapter")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Explosive(mark)))
    assert mark.exists()  # it would have run


def stubborn_optimiser(folder: Path, patch: Patch) -> None:
    """F55: it goes on with what it has, or says why not."""
    settings = cma.CMASettings(dimension=5, population_size=8, sigma0=1.0, bounds=5.0)
    losses: list[Callable[[Any], Any]] = [
        lambda x: np.full(8, 7.0),
        lambda x: np.full(8, np.inf),
        lambda x: np.where(x[:, 0] > 0, np.nan, x[:, 1]),
        lambda x: -x.sum(axis=1) * 1e300,
    ]
    for loss in losses:
        state = cma.init(settings)
        for _ in range(300):
            candidates, state = cma.ask(settings, state)
            assert np.isfinite(candidates).all()
            state = cma.tell(settings, state, candidates, loss(candidates))
        assert 0 < state.sigma < np.inf
        assert state.generation == 300
    sick = cma.init(settings)._replace(covariance=-np.eye(5), decomposed_at=-99)
    candidates, sick = cma.ask(settings, sick)
    sick = cma.tell(settings, sick, candidates, candidates[:, 0])
    assert np.isfinite(cma.ask(settings, sick)[0]).all()
    world = soft_world()
    for budget in (0, 3):
        with pytest.raises(InputError, match="budget"):
            dry_run(make_task(), world.capabilities, options(budget=budget, recipe="craft"))
    assert world.asked == 0


def attacked_server(folder: Path, patch: Patch) -> None:
    """F56, one attack of each kind; the others stand in test_server_attacks."""
    app, path = app_of(token=Secret("token"), most_bytes=2**20), "/blackbox/v1/scores"
    mine = {"Authorization": "Bearer token"}
    assert post(app, path, asked()).status_code == 401
    assert post(app, path, asked(), Authorization="Bearer other").status_code == 401
    assert call(app, "POST", path, content=b"x" * 2**21, headers=mine).status_code == 413
    assert post(app, path, asked(), Host="evil.example", **mine).status_code == 400
    crowd = asked(texts=[f"label {number}" for number in range(10_000)])
    assert post(app, path, crowd, **mine).status_code == 422
    assert call(app, "POST", path, content=b"[" * 10**5, headers=mine).status_code == 422
    assert usage(app, authorization="Bearer token")["billed"] == 0
    assert post(app, path, asked(), **mine).status_code == 200
    assert usage(app, authorization="Bearer token")["billed"] == 1


ROWS: dict[str, Callable[[Path, Patch], None]] = {
    "F48 broken and odd pictures": broken_pictures,
    "F49 hostile folders": hostile_folders,
    "F50 odd class names": odd_names,
    "F51 planted key": planted_key,
    "F52 hostile environment": hostile_environment,
    "F53 hostile URLs": hostile_urls,
    "F54 hostile adapters": hostile_adapters,
    "F55 stubborn optimiser": stubborn_optimiser,
    "F56 attacked server": attacked_server,
}

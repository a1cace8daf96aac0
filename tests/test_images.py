"""Images as untrusted files: fault matrix row 48, and the special files of row 49."""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from blackbox_vlm import images
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import BrokenFile, Image, check_images, find_images, quote

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112


def quadrants() -> PIL.Image.Image:
    """32 wide, 48 high: red, green / blue, white."""
    picture = PIL.Image.new("RGB", (32, 48), WHITE)
    picture.paste(RED, (0, 0, 16, 24))
    picture.paste(GREEN, (16, 0, 32, 24))
    picture.paste(BLUE, (0, 24, 16, 48))
    return picture


def save(path: Path, picture: PIL.Image.Image | None = None, **options: object) -> Path:
    (picture or quadrants()).save(path, **options)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends after declaring its size: refusing it must not need the pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT"


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def bomb(path: Path) -> Path:
    save(path, PIL.Image.new("L", (9000, 9000)))
    assert path.stat().st_size < 1e6
    return path


def noise(folder: Path, name: str) -> Path:
    rng = np.random.Generator(np.random.PCG64(0))
    return save(folder / name, PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)))


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link(path: Path, target: Path | str) -> Path:
    path.symlink_to(target)
    return path


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated jpeg": (lambda d: cut(noise(d, "a.jpg"), 0.5), "truncated"),
    "truncated png": (lambda d: cut(noise(d, "a.png"), 0.5), "truncated"),
    "truncated gif": (lambda d: cut(noise(d, "a.gif"), 0.5), "truncated"),
    "truncated bmp": (lambda d: cut(noise(d, "a.bmp"), 0.5), "truncated"),
    "truncated tiff": (lambda d: cut(noise(d, "a.tif"), 0.5), "damaged"),
    "truncated webp": (lambda d: cut(noise(d, "a.webp"), 0.5), "damaged"),
    "0 bytes": (lambda d: written(d / "a.jpg", b""), "empty file"),
    "text": (lambda d: written(d / "a.jpg", b"not a picture\n"), "not a JPEG"),
    "eps": (lambda d: written(d / "a.png", EPS), "not a JPEG"),
    "ps after magic": (lambda d: written(d / "a.jpg", b"\xff\xd8\xff" + EPS), "damaged header"),
    "wav": (lambda d: written(d / "a.webp", b"RIFF\x24\0\0\0WAVEfmt "), "damaged header"),
    "svg": (lambda d: written(d / "a.png", b"<svg onload='x'/>"), "not a JPEG"),
    "81 Mpx": (lambda d: bomb(d / "a.png"), "9000 x 9000 pixels, above 50 Mpx"),
    "100 Mpx": (lambda d: written(d / "a.png", png_header(10_000, 10_000)), "above 50 Mpx"),
    "4 Gpx": (lambda d: written(d / "a.png", png_header(65_535, 65_535)), "above 50 Mpx"),
    "60,000 x 1": (lambda d: save(d / "a.png", PIL.Image.new("L", (60_000, 1))), "100 times"),
    "no pixels": (lambda d: written(d / "a.gif", b"GIF89a" + bytes(7) + b"," + bytes(9)), "header"),
    "float": (lambda d: save(d / "a.tif", PIL.Image.new("F", (4, 4))), "32-bit"),
    "32-bit": (lambda d: save(d / "a.tif", PIL.Image.new("I", (4, 4))), "32-bit"),
    "missing": (lambda d: d / "a.jpg", "No such file"),
    "folder": (lambda d: d, "not a regular file"),
    "name with NUL": (lambda d: d / "a\0.jpg", "null"),
    "link out": (
        lambda d: link(d / "a.png", save(d.parent / "out.png")),
        "leads out of the data folder",
    ),
    "dotted link out": (
        lambda d: link(d / "a.png", Path("..") / save(d.parent / "out.png").name),
        "leads out of the data folder",
    ),
    "dangling link": (lambda d: link(d / "a.png", "nowhere"), "No such file"),
    "link to itself": (lambda d: link(d / "a.png", "a.png"), ""),
    "device": (lambda d: link(d / "a.png", "/dev/zero"), "leads out of the data folder"),
    "fifo": (lambda d: fifo(d / "a.jpg"), "not a regular file"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_file_is_listed_with_its_reason(fault: str, root: Path) -> None:
    make, reason = BROKEN[fault]
    path = make(root)
    (result,) = check_images([path], root)
    assert isinstance(result, BrokenFile)
    assert result.path == path
    assert reason in result.reason
    assert str(result).isprintable()


UNREADABLE = {
    *("truncated jpeg", "0 bytes", "81 Mpx", "missing", "folder", "name with NUL", "fifo"),
    *("dangling link", "link to itself"),
}


@pytest.mark.parametrize("fault", sorted(UNREADABLE))
def test_one_broken_file_is_an_error_that_names_it(fault: str, root: Path) -> None:
    path = BROKEN[fault][0](root)
    with pytest.raises(InputError) as raised:
        Image.from_file(path).load()
    assert quote(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bomb_is_refused_by_its_header_and_quietly(root: Path) -> None:
    limit = PIL.Image.MAX_IMAGE_PIXELS
    path = written(root / "a.png", png_header(10_000, 10_000))  # where Pillow itself warns
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (result,) = check_images([path], root)
    assert isinstance(result, BrokenFile)
    assert "10000 x 10000" in result.reason
    assert not caught
    assert limit == PIL.Image.MAX_IMAGE_PIXELS


def test_the_limits_do_not_hang_on_the_users_pillow_settings(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    path = written(root / "a.png", png_header(10_000, 10_000))
    assert isinstance(check_images([path], root)[0], BrokenFile)


def test_byte_cap(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(root / "a.png")
    monkeypatch.setattr(images, "MAX_BYTES", path.stat().st_size)
    assert isinstance(check_images([path], root)[0], Image)
    monkeypatch.setattr(images, "MAX_BYTES", path.stat().st_size - 1)
    assert isinstance(check_images([path], root)[0], BrokenFile)
    with pytest.raises(InputError, match="more than"):
        Image.from_file(path)


def test_a_fifo_does_not_block_even_when_swapped_in(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, answers = fifo(root / "a.jpg"), images.stat.S_ISREG, [True]
    monkeypatch.setattr(images.stat, "S_ISREG", lambda m: answers.pop() if answers else real(m))
    results: list[object] = []
    reader = threading.Thread(
        target=lambda: results.extend(check_images([path], root)), daemon=True
    )
    reader.start()
    reader.join(5)
    assert [type(result) for result in results] == [BrokenFile]


@pytest.mark.parametrize("make", [fifo, lambda path: link(path, os.devnull)])
def test_special_files_are_not_even_opened(
    make: Callable[[Path], Path], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = make(root / "a.jpg"), []
    monkeypatch.setattr(images.os, "open", lambda *args: opened.append(args))
    with pytest.raises(InputError, match="not a regular file"):
        Image.from_file(path)
    assert not opened


def pixel(path: Path, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    picture = Image.from_file(path).load()
    assert picture.mode == "RGB"
    value = picture.getpixel(at)
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_every_format_decodes_to_its_colours(name: str, root: Path) -> None:
    path = save(root / name)
    for at, colour in {(4, 4): RED, (28, 4): GREEN, (4, 44): BLUE, (28, 44): WHITE}.items():
        assert np.abs(np.subtract(pixel(path, at), colour)).max() < 12
    assert check_images([path], root) == [Image.from_file(path)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str, root: Path) -> None:
    picture = PIL.Image.new("RGB", (8, 8), WHITE).convert(mode)
    assert pixel(save(root / "a.tif", picture)) == WHITE


def test_cmyk_jpeg_keeps_its_colour(root: Path) -> None:
    path = save(root / "a.jpg", quadrants().convert("CMYK"), quality=95)
    with PIL.Image.open(path) as stored:
        assert stored.mode == "CMYK"
    assert np.abs(np.subtract(pixel(path, (4, 4)), RED)).max() < 12


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled_not_clipped(name: str, dtype: str, root: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype)
    path = save(root / name, PIL.Image.fromarray(values))
    loaded = np.asarray(Image.from_file(path).load())
    assert loaded[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert (loaded == loaded[..., :1]).all()


def test_transparent_16_bit_grey_is_white(root: Path) -> None:
    values = np.array([[0, 4660, 4661]], np.uint16)
    path = save(root / "a.png", PIL.Image.fromarray(values), transparency=4660)
    assert np.asarray(Image.from_file(path).load())[0, :, 0].tolist() == [0, 255, 4661 >> 8]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparency_is_put_on_white(mode: str, root: Path) -> None:
    path, options = root / "a.png", {}
    if mode == "RGBA":
        picture = PIL.Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    elif mode == "LA":
        picture = PIL.Image.new("LA", (2, 1), (0, 0))
    elif mode == "PA":
        path = root / "a.gif"
        picture = PIL.Image.new("RGBA", (2, 1), (0, 0, 255, 0))
    else:
        picture = PIL.Image.new(mode, (2, 1))
        options = {"transparency": 0 if mode == "P" else (0, 0, 0)}
    assert pixel(save(path, picture, **options)) == WHITE


def test_half_transparent_red_is_pink(root: Path) -> None:
    picture = PIL.Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert pixel(save(root / "a.png", picture)) == (255, 127, 127)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_animated_gives_its_first_frame(name: str, root: Path) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(root / name, save_all=True, append_images=frames[1:], **options)
    assert pixel(root / name) == RED
    assert isinstance(check_images([root / name], root)[0], Image)


UPSIDE = {  # orientation -> how an upright picture is stored under it (the inverse of the turn)
    1: None,
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_90,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", UPSIDE)
def test_exif_orientation_is_applied_once(name: str, orientation: int, root: Path) -> None:
    turn = UPSIDE[orientation]
    stored = quadrants() if turn is None else quadrants().transpose(turn)
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    loaded = Image.from_file(save(root / name, stored, exif=exif)).load()
    assert loaded.size == (32, 48)
    difference = np.abs(np.asarray(loaded, int) - np.asarray(quadrants(), int))
    assert np.median(difference) < 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_unreadable_exif_does_not_cost_the_picture(exif: bytes, root: Path) -> None:
    path = save(root / "a.jpg", exif=exif)
    assert Image.from_file(path).load().size == (32, 48)


def test_the_loaded_picture_carries_no_metadata(root: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x010E] = "taken at home"
    loaded = Image.from_file(save(root / "a.png", exif=exif)).load()
    assert not loaded.info
    assert b"taken at home" not in save(root / "b.png", loaded).read_bytes()


def test_an_image_is_the_hash_of_its_bytes_and_holds_no_pixels(root: Path) -> None:
    path = save(root / "a.png")
    image = Image.from_file(path)
    assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert image.path.is_absolute()
    assert not hasattr(image, "__dict__")


def test_a_relative_path_survives_a_change_of_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(root / "a.png")
    monkeypatch.chdir(root)
    image = Image.from_file("a.png")
    monkeypatch.chdir(root.parent)
    assert image.load().size == (32, 48)


def test_bytes_that_changed_are_refused(root: Path) -> None:
    image = Image.from_file(save(root / "a.png"))
    save(root / "a.png", PIL.Image.new("RGB", (9, 9)))
    with pytest.raises(InputError, match=r"a\.png' has changed"):
        image.load()


def test_results_stand_in_the_order_of_the_paths(root: Path) -> None:
    colours = [(i, 0, 0) for i in range(150)]  # more than two batches
    paths = [
        save(root / f"{i}.bmp", PIL.Image.new("RGB", (2, 2), c)) for i, c in enumerate(colours)
    ]
    paths[70].write_bytes(b"BM")
    results = check_images(paths, root)
    assert [result.path for result in results] == paths
    assert [i for i, r in enumerate(results) if isinstance(r, BrokenFile)] == [70]
    assert check_images([], root) == []


def test_large_pictures_are_decoded_one_at_a_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, running, peak, real = threading.Lock(), 0, 0, images._to_rgb

    def watched(image: images.ImageFile) -> PIL.Image.Image:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return real(image)

    monkeypatch.setattr(images, "_to_rgb", watched)
    monkeypatch.setattr(images, "_BATCH", 1)
    monkeypatch.setattr(images.os, "cpu_count", lambda: 4)
    paths = [save(root / "a.png")] * 8
    check_images(paths, root)
    assert peak > 1
    peak = 0
    monkeypatch.setattr(images, "_LARGE_PIXELS", 0)
    check_images(paths, root)
    assert peak == 1


def test_a_link_inside_the_root_is_taken(root: Path) -> None:
    path = link(root / "b.png", save(root / "a.png"))
    assert check_images([path], root)[0] == Image(path, Image.from_file(path).sha256)


def test_a_root_that_is_a_link_is_taken(root: Path) -> None:
    save(root / "a.png")
    alias = link(root.parent / "alias", root)
    assert isinstance(check_images([alias / "a.png"], alias)[0], Image)


def test_a_sibling_that_begins_like_the_root_is_outside(root: Path) -> None:
    sibling = root.parent / "root2"
    sibling.mkdir()
    assert isinstance(check_images([save(sibling / "a.png")], root)[0], BrokenFile)


def test_find_images_by_suffix_in_order_without_hidden_names(root: Path) -> None:
    wanted = ["B.JPG", "a.jpeg", "sub/c.webp", "sub/deep/d.TiFF", "x.gif", "y.bmp", "z.tif"]
    ignored = [".hidden.png", ".cache/e.png", "notes.txt", "png", "archive.png.zip"]
    for name in wanted + ignored:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert [str(path.relative_to(root)) for path in find_images(root)] == wanted


def test_a_linked_folder_is_reported_and_not_followed(root: Path) -> None:
    (root / "inner").mkdir()
    loop = link(root / "inner" / "loop", "..")
    assert find_images(root) == [loop]
    assert isinstance(check_images([loop], root)[0], BrokenFile)


def test_deep_folders_do_not_exhaust_the_stack(root: Path) -> None:
    below = list(itertools.accumulate(["d"] * 1200, Path.joinpath, initial=root))[1:]
    for folder in below:
        folder.mkdir()
    deep = below[-1] / "a.png"
    deep.touch()
    try:
        assert find_images(root) == [deep]
    finally:  # or pytest fails to remove its own folders later
        deep.unlink()
        for folder in reversed(below):
            folder.rmdir()


def test_a_folder_that_cannot_be_read_is_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "closed").mkdir(mode=0)
    real = os.scandir

    def scandir(path: Path) -> object:  # root reads what it likes: deny it by hand
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(images.os, "scandir", scandir)
    with pytest.raises(InputError, match="closed': Permission denied"):
        find_images(root)


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\nb", "\u202egnp.exe", "\u200b", "\udcff"])
def test_quote_leaves_nothing_for_the_terminal(text: str) -> None:
    assert quote(text).isprintable()
    assert quote(text).isascii()


def test_quote_is_short_and_keeps_letters() -> None:
    assert len(quote("x" * 10_000)) < 210
    assert quote("café") == "'café'"

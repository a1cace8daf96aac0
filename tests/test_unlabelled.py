"""Images without labels: loaded beside few labels or none, from Python and the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result

from blackbox_vlm import _layout, commands_tune
from blackbox_vlm.cli import main
from blackbox_vlm.cli_options import METHODS
from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image
from blackbox_vlm.plan import Method
from blackbox_vlm.settings import Settings
from blackbox_vlm.task import MIN_IMAGES, Task, check_pool

CLASSES = "n01,cat\nn02,Red Fox\nn03,cow\n"


def picture(path: Path, shade: int) -> Path:
    """A picture; those of one shade have the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (3, 3), (shade, 0, 7)).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    return write(tmp_path / "classes.txt", CLASSES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """0.png to 8.png, the last two in folders, one of which is called like a class."""
    root = tmp_path / "photos"
    for i in range(7):
        picture(root / f"{i}.png", i)
    picture(root / "monday" / "7.png", 7)
    picture(root / "n01" / "deep" / "8.png", 8)
    return root


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Class folders below train (five of each of two classes) and test."""
    root = tmp_path / "pets"
    for i in range(10):
        picture(root / "train" / ("cat", "dog")[i % 2] / f"{i}.png", 100 + i)
    for i in range(2):
        picture(root / "test" / ("cat", "dog")[i] / f"{i}.png", 120 + i)
    return root


def names(images: tuple[Image, ...]) -> list[str]:
    return [image.path.stem for image in images]


def labelled(task: Task) -> dict[str, int]:
    assert task.labels is not None
    return dict(zip(names(task.images), task.labels.tolist(), strict=True))


def refused(make: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InputError) as raised:
        make()
    message = str(raised.value)
    assert message.isprintable()
    for part in parts:
        assert part in message


# Data without a label.


def test_every_image_at_any_depth_whatever_its_folder(photos: Path, classes: Path) -> None:
    task, pool = Task.partly_labelled(photos, classes=classes)
    assert task.class_names == ("cat", "Red Fox", "cow")
    assert names(pool) == [str(i) for i in range(9)]
    assert task.images == ()
    assert task.labels is not None
    assert (task.labels.dtype, task.labels.shape) == (np.int64, (0,))
    assert repr(task) == "Task(0 images, 3 classes, labelled)"
    assert task.fingerprint() != task.unlabelled().fingerprint()


def test_a_picture_is_taken_once(photos: Path, classes: Path) -> None:
    shutil.copy(photos / "0.png", photos / "zero.png")
    assert names(Task.partly_labelled(photos, classes=classes)[1]) == [str(i) for i in range(9)]


def test_a_split_that_is_not_asked_for_stays_unseen(tmp_path: Path, classes: Path) -> None:
    for i in range(8):
        picture(tmp_path / "data" / "train" / f"{i}.png", i)
    picture(tmp_path / "data" / "test" / "9.png", 9)
    _, pool = Task.partly_labelled(tmp_path / "data", classes=classes)
    assert names(pool) == [str(i) for i in range(8)]


def test_class_names_from_meta(photos: Path, tmp_path: Path) -> None:
    meta = {"classnames": ["cat", "cow"], "class_dirs": ["a", "b"], "prompt_template": "my {}"}
    write(photos / "meta.json", json.dumps(meta))
    few = write(tmp_path / "few.csv", "path,label\n1.png,b\n2.png,cat\n")
    task, _ = Task.partly_labelled(photos, labels=few)
    assert (task.texts(), labelled(task)) == (("my cat", "my cow"), {"1": 1, "2": 0})
    assert Task.partly_labelled(photos, template="{}")[0].template == "{}"


def test_a_table_of_paths_whose_labels_are_not_read(photos: Path, classes: Path) -> None:
    rows = "".join(f"{i}.png,nonsense\n" for i in range(6, -1, -1))
    table = write(photos / "t.csv", f"path,label\n{rows}monday/7.png,\n0.png,\n")
    task, pool = Task.partly_labelled(table, classes=classes)
    assert (len(task), names(pool)) == (0, list("65432107"))


def test_a_table_without_labels_beside_meta_and_another_with_some(photos: Path) -> None:
    write(photos / "meta.json", json.dumps({"classnames": ["cat", "cow"]}))
    table = write(photos / "t.csv", "\n".join(["path", *(f"{i}.png" for i in range(7))]))
    few = write(photos.parent / "few.csv", "path,label\n5.png,cow\nmonday/7.png,cow\n")
    refused(lambda: Task.partly_labelled(table, labels=few), "line 3", "no image of the data")
    write(table, table.read_text() + "\nmonday/7.png\n")
    task, pool = Task.partly_labelled(table, labels=few)
    assert (labelled(task), names(pool)) == ({"5": 1, "7": 1}, list("012346"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("file\n0.png\n", ["begins with 'file'", "`path`"]),
        ("path\n0.png\n../1.png\n", ["line 3", "'../1.png'", "outside"]),
        ("path\n0,png\n", ["line 2", "does not fit", "wanted a path"]),
        ("path\n", ["no readable image"]),
    ],
)
def test_a_table_that_does_not_fit(
    text: str, parts: list[str], photos: Path, classes: Path
) -> None:
    table = write(photos / "t.csv", text)
    refused(lambda: Task.partly_labelled(table, classes=classes), *parts)


# Some labels.


def test_labels_by_name_or_folder_and_the_rest_is_the_pool(photos: Path, classes: Path) -> None:
    shutil.copy(photos / "2.png", photos / "copy.png")
    rows = ["n01/deep/8.png,red_FOX", "copy.png,N03", f"{photos}/4.png,Cow", "4.png,n03"]
    few = write(photos.parent / "few.csv", "\n".join(["path,label", *rows]))
    task, pool = Task.partly_labelled(photos, classes=classes, labels=few)
    assert labelled(task) == {"2": 2, "4": 2, "8": 1}
    assert names(pool) == ["0", "1", "3", "5", "6", "7"]


def test_a_relative_folder_with_dots(
    photos: Path, classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = write(photos.parent / "few.csv", "path,label\nmonday/../0.png,cat\n")
    monkeypatch.chdir(photos / "monday")
    task, pool = Task.partly_labelled("../../photos", classes=classes, labels=few)
    assert (labelled(task), len(pool)) == ({"0": 0}, 8)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ("0.png,cat\n1.png,tiger", ["line 3", "'tiger'", "none of the 3 classes"]),
        ("none.png,cat", ["line 2", "'none.png'", "no image of the data", "photos'"]),
        ("../out.png,cat", ["line 2", "'../out.png'", "outside"]),
        ("/etc/passwd,cat", ["line 2", "outside"]),
        ("0.png,cat\n0.png,cow", ["line 3", "'cow'", "same picture 'cat'", "line 2"]),
        ("0.png,cat\ncopy.png,n03", ["line 3", "'copy.png'", "same picture 'cat'", "line 2"]),
        ("0.png,cat\nbad.png,cat", ["line 3", "bad.png'", "not a JPEG", "remove the line"]),
        ("0.png,", ["line 2", "a path and a label"]),
        ("", ["few.csv'", "labels no image"]),
    ],
)
def test_labels_that_do_not_fit(rows: str, parts: list[str], photos: Path, classes: Path) -> None:
    shutil.copy(photos / "0.png", photos / "copy.png")
    write(photos / "bad.png", "text")
    few = write(photos.parent / "few.csv", f"path,label\n{rows}\n")
    refused(lambda: Task.partly_labelled(photos, classes=classes, labels=few), *parts)


def test_labels_of_an_empty_file(photos: Path, classes: Path) -> None:
    few = write(photos.parent / "few.csv", "")
    refused(lambda: Task.partly_labelled(photos, classes=classes, labels=few), "empty file")
    few.unlink()
    refused(lambda: Task.partly_labelled(photos, classes=classes, labels=few), "No such file")


@pytest.mark.parametrize("lines", ["cat,dog\ndog,wolf\n", "a,dog\na,wolf\n"])
def test_a_word_that_calls_two_classes(lines: str, photos: Path) -> None:
    classes = write(photos.parent / "classes.txt", lines)
    assert len(Task.partly_labelled(photos, classes=classes)[1]) == 9
    few = write(photos.parent / "few.csv", "path,label\n0.png,wolf\n")
    refused(lambda: Task.partly_labelled(photos, classes=classes, labels=few), "calls two classes")


def test_labels_are_checked_before_a_picture_is_opened(
    photos: Path, classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_layout, "check_images", None)
    few = write(photos.parent / "few.csv", "path,label\n0.png,tiger\n")
    refused(lambda: Task.partly_labelled(photos, classes=classes, labels=few), "'tiger'")


# Too little.


def test_nothing_or_too_little_to_tune_on(photos: Path, classes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = tmp_path / "empty"
    refused(lambda: Task.partly_labelled(empty, classes=classes), "no readable image", "empty'")
    shutil.rmtree(photos / "monday")
    shutil.copy(photos / "0.png", photos / "copy.png")
    assert len(Task.partly_labelled(photos, classes=classes)[1]) == MIN_IMAGES
    write(photos / "6.png", "text")
    refused(lambda: Task.partly_labelled(photos, classes=classes), "got 7", "at least 8", "6.png'")


def test_labels_count_as_images(photos: Path, classes: Path) -> None:
    shutil.rmtree(photos / "monday")
    few = write(photos.parent / "few.csv", "path,label\n0.png,cat\n1.png,cow\n")
    task, pool = Task.partly_labelled(photos, classes=classes, labels=few)
    assert (len(task), len(pool)) == (2, 6)


def test_more_classes_than_images(photos: Path, tmp_path: Path) -> None:
    for n in (9, 10):
        classes = write(tmp_path / "classes.txt", "\n".join(f"class {i}" for i in range(n)))
        if n == 9:
            assert len(Task.partly_labelled(photos, classes=classes)[1]) == 9
    refused(lambda: Task.partly_labelled(photos, classes=classes), "more classes than images", "10")


def test_one_class_and_no_class(photos: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "classes.txt", "cat\n")
    refused(lambda: Task.partly_labelled(photos, classes=one), "1 class", "at least two")
    refused(lambda: Task.partly_labelled(photos), "no labels", "--classes FILE")


def test_nothing_is_left_without_a_label(photos: Path, classes: Path) -> None:
    rows = [f"{i}.png,cat" for i in range(7)] + ["monday/7.png,cow", "n01/deep/8.png,cow"]
    few = write(photos.parent / "few.csv", "\n".join(["path,label", *rows]))
    refused(
        lambda: Task.partly_labelled(photos, classes=classes, labels=few), "all 9", "pool holds no"
    )


def test_broken_images_are_skipped_or_strictly_refused(photos: Path, classes: Path) -> None:
    write(photos / "0.png", "text")
    task, pool = Task.partly_labelled(photos, classes=classes)
    assert [broken.path.name for broken in task.skipped] == ["0.png"]
    assert len(pool) == 8
    refused(
        lambda: Task.partly_labelled(photos, classes=classes, strict=True), "1 of 9 files", "0.png"
    )


# A pool beside class folders.


def test_the_rest_of_the_data_is_a_pool(pets: Path) -> None:
    whole = Task.from_folder(pets)
    few, pool = whole.sample(2, 0).with_pool(pets)
    assert few.fingerprint() == whole.sample(2, 0).fingerprint()
    assert {i.sha256 for i in pool} | {i.sha256 for i in few.images} == {
        i.sha256 for i in whole.images
    }
    assert (len(few), len(pool)) == (4, 6)
    assert {image.path.parts[-3] for image in pool} == {"train"}
    assert set(few.rest_of(whole.images)) == set(pool)


def test_known_and_repeated_bytes_are_no_news(pets: Path, photos: Path) -> None:
    shutil.copy(pets / "train" / "cat" / "0.png", photos / "known.png")
    shutil.copy(photos / "0.png", photos / "again.png")
    _, pool = Task.from_folder(pets).with_pool(photos)
    assert names(pool) == [str(i) for i in range(9)]


def test_what_a_pool_cannot_use_is_listed(pets: Path, photos: Path) -> None:
    write(photos / "0.png", "text")
    write(pets / "train" / "cat" / "bad.png", "text")
    whole = Task.from_folder(pets)
    task, pool = whole.with_pool(photos)
    assert [broken.path.name for broken in task.skipped] == ["bad.png", "0.png"]
    assert len(pool) == 8
    refused(lambda: whole.with_pool(photos, strict=True), "0.png", "not a JPEG")


def test_a_pool_with_nothing_new(pets: Path, photos: Path, tmp_path: Path) -> None:
    whole = Task.from_folder(pets)
    refused(lambda: whole.with_pool(pets), "all 10 images are labelled", "fewer shots")
    refused(lambda: whole.with_pool(tmp_path / "none"), "none'", "No such file")
    few = whole.sample(1, 0)
    for i in range(6):
        picture(tmp_path / "six" / f"{i}.png", i)
    assert len(few.with_pool(tmp_path / "six")[1]) == 6
    (tmp_path / "six" / "0.png").unlink()
    refused(lambda: few.with_pool(tmp_path / "six"), "got 7", "at least 8")


def test_a_task_of_ones_own_is_checked_alike() -> None:
    images = tuple(Image(Path(f"/data/{i}.png"), f"{i:064x}") for i in range(9))
    bare = Task(("a", "b"), "{}", (), np.zeros(0, np.int64))
    assert len(bare.fingerprint()) == 64
    check_pool(bare, images[:8])
    refused(lambda: check_pool(bare, images[:7]), "got 7")
    refused(lambda: check_pool(bare, ()), "got 0")


# On the command line.


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_line_knows_every_method() -> None:
    assert set(METHODS) == set(Method)


UNLABELED = ("--unlabeled", "--classes", "classes.txt")


@pytest.mark.parametrize(
    ("data", "words", "said"),
    [
        ("photos/monday", (), ["0 class folders", "--unlabeled --classes FILE", "labelled=False"]),
        ("photos", ("--unlabeled",), ["no labels", "--classes FILE"]),
        ("photos", (*UNLABELED, "--pool", "pets"), ["--pool", "exclude", "give --unlabeled where"]),
        ("photos", (*UNLABELED, "--shots", "2"), ["--shots", "nothing to sample"]),
        ("pets", ("--labels", "few.csv"), ["--labels", "give --unlabeled"]),
        ("photos", (*UNLABELED, "--labels", "few.csv"), ["line 2", "'tiger'"]),
        ("photos/0.png", UNLABELED, ["is one image"]),
        ("pets", ("--pool", "pets"), ["all 10 images are labelled"]),
        ("pets", ("--shots", "2", "--pool", "none"), ["none'", "No such file"]),
        ("photos", (*UNLABELED, "--audit", "0"), ["--audit"]),
    ],
)
def test_bad_input_is_one_line_before_a_query(
    data: str,
    words: tuple[str, ...],
    said: list[str],
    photos: Path,
    pets: Path,
    classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "few.csv", "path,label\n0.png,tiger\n")
    result = run("tune", data, "--budget", 50, "--out", "run", *words)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    for part in said:
        assert part in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("photos", *UNLABELED),
        ("photos", *UNLABELED, "--labels", "few.csv"),
        ("photos/t.csv", *UNLABELED),
        ("pets", "--shots", "2", "--pool", "pets"),
    ],
)
def test_a_dry_run_spends_nothing(
    words: tuple[str, ...],
    photos: Path,
    pets: Path,
    classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_load: None,
    few_drawings: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "few.csv", "path,label\n0.png,cat\n1.png,cow\n")
    write(photos / "t.csv", "path\n" + "".join(f"{i}.png\n" for i in range(7)) + "monday/7.png\n")
    before = sorted(tmp_path.rglob("*"))
    result = run("tune", *words, "--budget", 50, "--access", "embeddings", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert 0 < json.loads(result.stdout)["queries"] <= 50
    assert sorted(tmp_path.rglob("*")) == before


def settings(**more: Any) -> Settings:
    return Settings(data="/data", budget=1, **more)


def test_settings_load_what_the_options_say(photos: Path, pets: Path, classes: Path) -> None:
    few = write(photos.parent / "few.csv", "path,label\n0.png,cat\n")
    bare = Settings(
        data=str(photos), budget=1, unlabeled=True, classes=str(classes), labels=str(few)
    )
    task, pool = bare.load()
    assert (labelled(task), len(pool)) == ({"0": 0}, 8)
    beside = Settings(data=str(pets), budget=1, shots=1, pool=str(photos), template="my {}")
    task, pool = beside.load()
    assert (len(task), len(pool), task.template) == (2, 9, "my {}")
    plain = Settings(data=str(pets), budget=1, shots=1)
    assert plain.load()[1] == ()
    assert plain.load()[0].fingerprint() == plain.load_task().fingerprint()
    write(photos / "6.png", "text")
    for lenient in (bare, beside):
        assert len(lenient.load()[0].skipped) == 1
        refused(dataclasses.replace(lenient, strict=True).load, "6.png'", "not a JPEG")


def test_a_run_remembers_how_its_data_was_opened(tmp_path: Path) -> None:
    first = settings(unlabeled=True, labels="/few.csv", audit=20, method="coft")
    second = settings(shots=4, pool="/pool")
    for i, kept in enumerate((first, second)):
        (tmp_path / str(i)).mkdir()
        write(tmp_path / str(i) / "run.json", json.dumps(kept.to_description()))
        assert Settings.from_run(tmp_path / str(i)) == kept
    old = {"data": "/data", "budget": 1}
    write(tmp_path / "0" / "run.json", json.dumps(old))
    assert Settings.from_run(tmp_path / "0") == settings()


def test_options_are_absolute_and_reach_the_settings(
    photos: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Settings, Path]] = []

    def ended(settings: Settings, out: Path, **_: object) -> None:
        seen.append((settings, out))
        raise InputError("enough")

    monkeypatch.setattr(commands_tune, "_run", ended)
    monkeypatch.chdir(tmp_path)
    run("tune", "photos", *UNLABELED, "--labels", "few.csv", "--audit", 9, "--budget", 5)
    run("tune", "pets", "--pool", "photos", "--budget", 5, "--method", "coft")
    (bare, first), (beside, second) = seen
    assert dataclasses.replace(bare, data="") == Settings(
        data="",
        budget=5,
        unlabeled=True,
        classes=str(classes),
        labels=str(tmp_path / "few.csv"),
        audit=9,
    )
    assert (beside.pool, beside.unlabeled, beside.audit) == (str(photos), False, None)
    assert first == Path("runs/photos-unlabeled-soft-0")
    assert second == Path("runs/pets-pool-coft-0")

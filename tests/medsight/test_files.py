"""An output folder that appears whole or not at all, and nothing of another's is lost for it; a file of names."""

import errno
import shutil
from pathlib import Path

import pytest

from medsight.files import check_empty, read_names, staged_folder
from tests.medsight.answers import contents


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "deep").mkdir()
    (folder / "deep" / "weights").write_text("1")


def filled(output: Path) -> set[str]:
    return {path.relative_to(output).as_posix() for path in output.rglob("*")}


WHOLE = {"config.json", "deep", "deep/weights"}


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("existed", [False, True])
def test_what_appears_during_the_work_is_kept(kind: str, existed: bool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if existed:
        output.mkdir()
    with pytest.raises(OSError, match="out is"), staged_folder(output, False, check_empty) as stage:
        fill(stage)
        if existed or kind == "folder":
            output.mkdir(exist_ok=True)
            (output / "precious").write_text("x")
        else:
            output.write_text("x")
        before = contents(output) if output.is_dir() else output.read_text()
    assert (contents(output) if output.is_dir() else output.read_text()) == before
    assert list(tmp_path.iterdir()) == [output]


def test_of_a_link_the_folder_behind_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    output = tmp_path / "out"
    output.symlink_to(tmp_path / "disk")
    for overwrite in (False, True):
        with staged_folder(output, overwrite) as stage:
            fill(stage)
        assert output.is_symlink() and filled(tmp_path / "disk") == WHOLE
    assert set(tmp_path.iterdir()) == {output, tmp_path / "disk"}


def test_the_folder_that_the_process_runs_in_is_filled_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "here"
    output.mkdir()
    monkeypatch.chdir(output)
    with staged_folder(Path("."), False, check_empty) as stage:
        fill(stage)
    assert Path.cwd() == output and filled(Path(".")) == WHOLE and [*tmp_path.iterdir()] == [output]


def test_a_folder_that_cannot_be_filled_stays_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, move = tmp_path / "out", shutil.move
    output.mkdir()

    def full(path: Path, target: Path) -> Path:
        if path.name == "deep":
            target.mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")
        return move(path, target)

    monkeypatch.setattr(shutil, "move", full)
    with pytest.raises(OSError, match="No space left"), staged_folder(output, False) as stage:
        fill(stage)
    assert list(tmp_path.iterdir()) == [output] and not any(output.iterdir())


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_overwritten_comes_back_where_the_new_cannot_be_put(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    (output / "config.json").write_text("old")

    def broken(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(error), staged_folder(output, True) as stage:
        fill(stage)
    assert (output / "config.json").read_text() == "old" and list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("text", ["CT\n\n MRI brain \r\n", '\ufeff["CT", "MRI brain"]'])
def test_names_are_a_json_list_or_one_a_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_bytes(text.encode())
    assert read_names(path) == ["CT", "MRI brain"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "expected a JSON list of names or one name per line, none of them empty"),
        (b"[]", "expected a JSON list"),
        (b'["CT", ""]', "expected a JSON list"),
        (b'["CT", 1]', "expected a JSON list"),
        (b'["CT"', "is no list of names"),
        (b"CT\nMRI\nCT\n", "gives the name 'CT' more than once"),
        ("K\u00f6pfe".encode("latin-1"), "in UTF-8"),
    ],
)
def test_a_file_without_proper_names_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"names.txt.*{message}"):
        read_names(path)

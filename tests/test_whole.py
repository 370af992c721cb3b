"""training/whole.py: what ends badly leaves nothing behind, and what was there before stays."""

import errno

import pytest

from styleloom.training.whole import whole_file, whole_new_folder


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [x.name for x in tmp_path.iterdir()] == ["a.txt"]


def fail(path, error):
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_file_that_fails(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught:
        fail(path, error)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(path)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_at_the_end(tmp_path, there):
    path = tmp_path / "frames"
    if there:
        path.mkdir()
    with whole_new_folder(path) as temporary:
        (temporary / "a").write_text("a")
        assert not (path / "a").exists()
    assert (path / "a").read_text() == "a"
    assert [x.name for x in tmp_path.iterdir()] == ["frames"]


def test_a_folder_that_fails(tmp_path):
    def fail():
        with whole_new_folder(tmp_path / "frames") as temporary:
            (temporary / "a").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_is_not_overwritten(tmp_path, kind):
    path = tmp_path / "frames"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").touch()
    with pytest.raises(ValueError, match="is there already"), whole_new_folder(path):
        raise AssertionError

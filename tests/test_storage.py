"""datasets/storage.py: places and names; whole files in spite of everything; a plain line where that cannot be."""

import hashlib
import os

import pytest

from styleloom.datasets import storage
from styleloom.datasets.storage import (
    UnavailableError,
    fetch,
    is_remote,
    join,
    listing,
    local_path,
    open_url,
    read,
    shown,
)

DATA = bytes(range(256)) * 20_000  # 5 MB: several chunks
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(storage, "LONGEST_DELAY", 0.01)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "served" / "sub").mkdir(parents=True)
    (tmp_path / "served" / "a.tar").write_bytes(DATA)
    (tmp_path / "served" / "sub" / "ä b.tar").write_bytes(b"umlaut")
    return tmp_path / "served"


# Names


@pytest.mark.parametrize(
    ("place", "remote"),
    [
        ("data/set", False),
        ("/data/set", False),
        ("C:/data", False),
        ("file:///data/set", False),
        ("https://host/set", True),
        ("s3://bucket/set", True),
        ("hf://datasets/user/repo", True),
        ("pipe:cat /data/{}", True),
        ("a:b", False),
    ],
)
def test_what_is_remote(place, remote):
    assert is_remote(place) is remote


@pytest.mark.parametrize(
    ("place", "name", "joined"),
    [
        ("data/set", "a.tar", "data/set/a.tar"),
        ("file:///data/my%20set", "a.tar", "/data/my set/a.tar"),
        ("https://host/set/", "a b.tar", "https://host/set/a%20b.tar"),
        ("https://host/set?sig=x/y", "a.tar", "https://host/set/a.tar?sig=x/y"),
        ("s3://bucket/set/", "sub/a.tar", "s3://bucket/set/sub/a.tar"),
        ("s3://bucket/what?", "a.tar", "s3://bucket/what?/a.tar"),
        ("pipe:ssh host cat /d/{} | cat", "a b.tar", "pipe:ssh host cat /d/'a b.tar' | cat"),
    ],
)
def test_join(place, name, joined):
    assert join(place, name) == joined


def test_a_name_cannot_leave_its_command():
    assert join("pipe:cat {}", "x; rm -rf y") == "pipe:cat 'x; rm -rf y'"
    with pytest.raises(ValueError, match=r"pipe:cat x has no \{\}, where the name"):
        join("pipe:cat x", "a.tar")


def test_local_path():
    assert os.fspath(local_path("file:///data/my%20set")) == "/data/my set"
    assert os.fspath(local_path("data/my%20set")) == "data/my%20set"


def test_secrets_are_not_shown():
    assert shown("https://me:secret@host/set/a.tar?sig=secret") == "https://host/set/a.tar"
    assert shown("s3://bucket/a.tar") == "s3://bucket/a.tar"


# Whole files


@pytest.mark.parametrize(
    "faults",
    [
        (),
        ("503",),
        ("429", "500"),
        ("refuse",),
        ("drop", "short", "drop"),
        ("cut",),
        ("short", "no-range"),
        ("wrong",),
        ("flip", "wrong", "503"),
        ("short", "wrong", "drop", "flip", "cut", "refuse"),
    ],
    ids="+".join,
)
def test_the_file_is_whole_whatever_the_server_does(serve, folder, tmp_path, faults, capfd):
    with serve(folder, lambda path: faults) as server:
        fetch(join(server.url, "a.tar"), tmp_path / "got", len(DATA), SHA)
        assert server.count("a.tar") == len(faults) + 1 or faults[0] in ("cut", "short")
    assert (tmp_path / "got").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["got"]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(server.requests) - 1
    assert all("trying again in" in line for line in lines)


def test_a_server_that_stalls(serve, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(storage, "TIMEOUT", (5, 0.2))
    with serve(folder, lambda path: ["stall", "stall"]) as server:
        fetch(join(server.url, "a.tar"), tmp_path / "got", len(DATA), SHA)
    assert (tmp_path / "got").read_bytes() == DATA
    assert capfd.readouterr().err.count("timed out") == 2


def test_a_broken_connection_is_taken_up_where_it_broke(serve, folder, tmp_path):
    with serve(folder, lambda path: ("short", "short")) as server:
        fetch(join(server.url, "a.tar"), tmp_path / "got", len(DATA), SHA)
    ranges = [range_ for _, range_, _ in server.requests]
    assert ranges[0] == ""
    starts = [int(range_.removeprefix("bytes=").removesuffix("-")) for range_ in ranges[1:]]
    assert 0 < starts[0] < starts[1] < len(DATA)


def test_progress_renews_patience(serve, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 2)
    monkeypatch.setattr(storage, "CHUNK", 10_000)
    with serve(folder, lambda path: ["short"] * 5) as server:
        fetch(join(server.url, "a.tar"), tmp_path / "got", len(DATA), SHA)
    assert (tmp_path / "got").read_bytes() == DATA


@pytest.mark.parametrize("fault", ["503", "drop", "wrong", "refuse"])
def test_patience_ends_in_a_line_and_nothing_is_left(serve, folder, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(storage, "TRIES", 3)
    (folder / "a.tar").write_bytes(b"x" * 30)
    with serve(folder, lambda path: [fault] * 99) as server:
        url = join(server.url, "a.tar")
        with pytest.raises(UnavailableError, match=r"cannot read http://127.0.0.1:.*a.tar \(3 tries\)") as caught:
            fetch(url, tmp_path / "got", 30, hashlib.sha256(b"x" * 30).hexdigest())
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("got*"))


def test_what_another_try_would_not_mend_is_said_at_once(serve, folder, tmp_path):
    with serve(folder, lambda path: ["403"] if path == "a.tar" else []) as server:
        with pytest.raises(UnavailableError, match="403"):
            fetch(join(server.url, "a.tar"), tmp_path / "got")
        with pytest.raises(FileNotFoundError, match=r"cannot read .*nowhere.*404"):
            fetch(join(server.url, "nowhere"), tmp_path / "got")
        assert len(server.requests) == 2


def test_a_full_disk_is_not_the_servers_fault(serve, folder, tmp_path, monkeypatch):
    def full(file, block):
        raise storage._FullError(OSError(28, "No space left on device"))

    monkeypatch.setattr(storage, "_write", full)
    with serve(folder) as server:
        with pytest.raises(OSError, match="No space left") as caught:
            fetch(join(server.url, "a.tar"), tmp_path / "got")
        assert caught.value.errno == 28
        assert len(server.requests) == 1


def test_read(serve, folder):
    with serve(folder, lambda path: ["short", "503"]) as server:
        assert read(join(server.url, "a.tar")) == DATA
        assert read(join(server.url, "sub/ä b.tar")) == b"umlaut"
        assert read(join(server.url + "?signature=1", "a.tar")) == DATA


def test_open_url_from_a_byte_on(serve, folder):
    with serve(folder, lambda path: ["", "no-range"]) as server:
        for _ in range(2):
            with open_url(join(server.url, "a.tar"), 1_234_567) as stream:
                assert stream.read() == DATA[1_234_567:]


def test_more_than_was_promised_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 2)
    most = 0
    write = storage._write

    def watched(file, block):
        nonlocal most
        write(file, block)
        most = max(most, file.tell())

    monkeypatch.setattr(storage, "_write", watched)
    with pytest.raises(UnavailableError, match=r"other bytes came than the manifest promises"):
        fetch("pipe:cat /dev/zero", tmp_path / "got", 1000, SHA)
    assert most <= 1000 + storage.CHUNK
    monkeypatch.setattr(storage, "MOST_READ", 10**6)
    with pytest.raises(UnavailableError, match="it has more than"):
        read("pipe:cat /dev/zero")


def test_a_file_that_is_shorter_than_promised(serve, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 5)
    (folder / "a.tar").write_bytes(DATA[:600])
    with serve(folder) as server:
        with pytest.raises(UnavailableError, match=r"no more than the 600 bytes|600 of 5120000 bytes"):
            fetch(join(server.url, "a.tar"), tmp_path / "got", len(DATA), SHA)
        assert [range_ for _, range_, _ in server.requests] == ["", "bytes=600-", "", "bytes=600-", ""]


def test_signatures_are_not_told(monkeypatch, capfd):
    monkeypatch.setattr(storage, "TRIES", 2)
    with pytest.raises(UnavailableError) as caught:
        read("http://me:password@127.0.0.1:1/set/a.tar?sig=SECRET")
    told = str(caught.value) + capfd.readouterr().err
    assert "SECRET" not in told
    assert "password" not in told
    assert "127.0.0.1:1/set/a.tar" in told


# Commands


def test_pipe(folder, tmp_path):
    place = f"pipe:cat {folder}/{{}}"
    fetch(join(place, "a.tar"), tmp_path / "got", len(DATA), SHA)
    assert (tmp_path / "got").read_bytes() == DATA
    assert read(join(place, "sub/ä b.tar")) == b"umlaut"
    with open_url(join(place, "a.tar"), 1_234_567) as stream:
        assert stream.read() == DATA[1_234_567:]


def test_a_command_that_fails_now_and_then(folder, tmp_path):
    flag = tmp_path / "flag"
    command = f"pipe:test -e {flag} && cat {folder}/{{}} || {{ touch {flag}; head -c 99 {folder}/{{}}; exit 3; }}"
    fetch(join(command, "a.tar"), tmp_path / "got", len(DATA), SHA)
    assert (tmp_path / "got").read_bytes() == DATA


def test_a_command_that_fails_for_ever(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "TRIES", 2)
    with pytest.raises(UnavailableError, match=r"\(2 tries\).*exit 3"):
        read("pipe:exit 3")


def test_names_do_not_become_commands(tmp_path):
    """webdataset opens scp:// and the like by a program."""
    for name in (f"'; touch {tmp_path}/x; '.tar", f"$(touch {tmp_path}/x).tar", f"`touch {tmp_path}/x`.tar"):
        with pytest.raises(UnavailableError, match="could be taken for a command"):
            read(join("scp://host/set", name))
    assert not (tmp_path / "x").exists()


# Object stores


def test_an_unknown_scheme_and_a_missing_package(monkeypatch):
    with pytest.raises(UnavailableError, match="nothing://x/y: Protocol not known"):
        read("nothing://x/y")

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(storage.fsspec, "url_to_fs", missing)
    with pytest.raises(UnavailableError, match=r"install styleloom\[s3\] first"):
        read("s3://bucket/x")


def test_fsspec_places(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/set/b.tar", DATA)
    memory.pipe("/set/sub/a.tar", b"a")
    memory.pipe("/set/notes.txt", b"")
    fetch("memory://set/b.tar", tmp_path / "got", len(DATA), SHA)
    assert (tmp_path / "got").read_bytes() == DATA
    assert list(listing("memory://set", ".tar")) == ["b.tar", "sub/a.tar"]
    with pytest.raises(ValueError, match="cannot be listed: name the tars"):
        list(listing("https://host/set", ".tar"))


def test_s3(s3, tmp_path):
    """Against a real server of S3's protocol."""
    s3.put_object(Bucket="bucket", Key="set/a.tar", Body=DATA)
    fetch("s3://bucket/set/a.tar", tmp_path / "got", len(DATA), SHA)
    assert (tmp_path / "got").read_bytes() == DATA
    with open_url("s3://bucket/set/a.tar", 1_234_567) as stream:
        assert stream.read() == DATA[1_234_567:]
    assert list(listing("s3://bucket/set/", ".tar")) == ["a.tar"]
    with pytest.raises(FileNotFoundError, match=r"cannot read s3://bucket/set/b.tar"):
        read("s3://bucket/set/b.tar")


def test_pipes_of_the_system_are_waited_for():
    """A command's error comes after its last byte: it counts all the same."""
    with pytest.raises(OSError, match="exit 5"), open_url("pipe:echo hello; sleep 0.1; exit 5") as stream:
        assert stream.read() == b"hello\n"

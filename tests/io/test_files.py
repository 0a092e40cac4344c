import pytest

from pumice.io import check_writable, write_whole


def test_replaces_the_file(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "one")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "two")
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_names_may_be_as_long_as_they_can_be(tmp_path):
    path = tmp_path / ("日" * 85)  # 255 bytes
    write_whole(path, "one")
    assert path.read_text() == "one"


def test_check_writable_makes_the_folder(tmp_path):
    check_writable(tmp_path / "a" / "b", "out")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_check_writable_names_the_argument(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out: cannot write to '.*file'"):
        check_writable(tmp_path / "file", "--out")

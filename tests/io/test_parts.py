"""Finished parts of a job, and what interruptions leave of them."""

from __future__ import annotations

import pytest

from pumice.io.parts import Parts


def test_parts_are_found_again_by_their_job_alone(tmp_path):
    folder = tmp_path / "parts"
    Parts(folder, {"steps": 1}, restart=False).put("a", "1")
    again = Parts(folder, {"steps": 1}, restart=False)
    assert "a" in again and "b" not in again
    with pytest.raises(ValueError, match=r"out: .* of another model, list or settings"):
        Parts(folder, {"steps": 2}, restart=False)
    assert "a" not in Parts(folder, {"steps": 2}, restart=True)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("left", [[], [".0123abcd.7.partial"]])
def test_a_kill_before_the_manifest_is_gone_on_from(left, restart, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("half")
    Parts(folder, {}, restart=restart).put("a", "1")
    assert "a" in Parts(folder, {}, restart=False)


@pytest.mark.parametrize("restart", [False, True])
def test_what_is_not_pumices_stays(restart, tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=r"out: .* is not pumice's, it has no manifest.json"):
            Parts(path, {}, restart=restart)
    assert (tmp_path / "a.txt").read_text() == "mine"

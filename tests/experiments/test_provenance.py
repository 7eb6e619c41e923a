import shutil
import subprocess

from experiments import provenance


def git(directory, *args):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    command = ["git", "-C", directory, *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_says_whether_tracked_files_differ_from_it(tmp_path, monkeypatch):
    copy = tmp_path / "experiments" / "provenance.py"
    copy.parent.mkdir()
    shutil.copy(provenance.__file__, copy)
    monkeypatch.setattr(provenance, "__file__", str(copy))
    assert provenance.commit() is None
    git(tmp_path, "init")
    (tmp_path / "other").write_text("of a repository around the project")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "other")
    assert provenance.commit() is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "project")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("a result")
    assert provenance.commit() == head
    (tmp_path / "other").write_text("changed")
    assert provenance.commit() == f"{head}+dirty"
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None


def test_an_origin_has_its_fields():
    assert tuple(provenance.origin("make")) == provenance.FIELDS

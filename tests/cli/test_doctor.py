"""`python -m jaxcache doctor`: exit codes, reasons, JSON."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest

from jaxcache.cli import commands, doctor, main
from jaxcache.storage.base import ObjectKey
from jaxcache.storage.file import FileStorage

ROOT = Path(__file__).parent.parent.parent


def lines(text: str) -> dict[str, str]:
    """check -> the rest of its line."""
    return {
        check: f"{status} {detail}" for status, check, detail in (line.split(None, 2) for line in text.splitlines())
    }


def test_plain(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    found = lines(out)
    assert err == ""
    assert found["jax"] == f"ok {metadata.version('jax')}"
    assert found["python"] == f"ok {sys.version.split()[0]}"
    assert found["devices"].startswith(f"ok {len(jax.devices())} x ")
    assert "device" in found["memory_kinds"].split()
    assert found["pinned_host"].startswith("ok works")
    assert "mesh" not in found
    assert "storage" not in found


def test_mesh_that_fits(capsys):
    assert main(["doctor", "--platform", "cpu", "--mesh", "2,2,2"]) == 0
    assert lines(capsys.readouterr().out)["mesh"] == "ok cp2 x tp2 x pp2 on 8 of 8 devices"


def test_mesh_too_large(capsys):
    assert main(["doctor", "--platform", "cpu", "--mesh", "4,2,2"]) == 1
    out, err = capsys.readouterr()
    assert lines(out)["mesh"].startswith("FAIL cp4 x tp2 x pp2 needs 16 devices, there are 8")
    assert err.startswith("doctor: mesh: cp4 x tp2 x pp2 needs 16 devices")


@pytest.mark.parametrize("text", ["2,2", "0,1,1", "a,1,1", "1,1,1,1", "-1,1,1", ""])
def test_mesh_that_is_none(text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", f"--mesh={text}"])
    assert stop.value.code == 2
    assert "cp,tp,pp" in capsys.readouterr().err


def test_storage_leaves_nothing_behind(tmp_path, capsys):
    assert main(["doctor", "--storage", str(tmp_path)]) == 0
    assert lines(capsys.readouterr().out)["storage"].startswith(f"ok {tmp_path}: write, read, link")
    assert not list(tmp_path.iterdir())
    (tmp_path / "lost+found").mkdir()  # an empty volume
    assert main(["doctor", "--storage", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["lost+found"]


def test_storage_that_does_not_exist(tmp_path, capsys):
    path = tmp_path / "not" / "yet"
    assert main(["doctor", "--storage", str(path)]) == 0
    said = lines(capsys.readouterr().out)["storage"]
    assert said.startswith(f"warn {path}: does not exist yet; serving would make it in {tmp_path}, which works (write,")
    assert said.endswith("check its name and the mount")
    assert not list(tmp_path.iterdir())


def test_storage_that_does_not_exist_and_cannot_be_made(tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path, reason in (
        (Path("/proc/no/such/folder"), "does not exist, and cannot be made in /proc: "),
        (tmp_path / "link", "No such file or directory"),
        (tmp_path / "link" / "below", "does not exist, and cannot be made in "),
    ):
        assert main(["doctor", "--storage", str(path)]) == 1
        assert f"doctor: storage: {path}: {reason}" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "in use"])
def test_a_killed_doctor_does_not_stop_serving(tmp_path, capsys, is_new):
    code = """if True:
        import os, pathlib, signal, sys
        from jaxcache.cli import doctor
        from jaxcache.storage.file import FileStorage
        FileStorage.put = lambda self, key, buffer: os.kill(os.getpid(), signal.SIGKILL)
        doctor.probe_storage(pathlib.Path(sys.argv[1]))
    """
    if not is_new:
        FileStorage(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = (path.name for path in tmp_path.iterdir() if path.name.startswith(".doctor-"))
    assert main(["doctor", "--storage", str(tmp_path)]) == 0
    assert lines(capsys.readouterr().out)["storage"].startswith("ok")
    assert not is_new or [path.name for path in tmp_path.iterdir()] == [left]  # it took no folder for itself
    key, value, buffer = ObjectKey(bytes(32), "full", "cell"), b"value", bytearray(5)
    storage = FileStorage(tmp_path)
    assert storage.put(key, memoryview(value))
    assert storage.get(key, memoryview(buffer))


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "in use"])
def test_storage_that_others_may_write(tmp_path, capsys, is_new):
    if not is_new:
        FileStorage(tmp_path)
    tmp_path.chmod(0o777)
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", "--storage", str(tmp_path)]) == 1
    assert "may be written by other users (mode 0777)" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    tmp_path.chmod(0o700)


def test_storage_of_another_user(tmp_path, capsys, monkeypatch):
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert main(["doctor", "--storage", str(tmp_path)]) == 1
    assert f"{tmp_path} belongs to user {uid}" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_storage_on_a_disk_that_takes_nothing(tmp_path, capsys, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    path = tmp_path / "storage"
    FileStorage(path)
    monkeypatch.setattr(os, "pwritev", refuse)
    assert main(["doctor", "--storage", str(path)]) == 0
    said = lines(capsys.readouterr().out)["storage"]
    assert said == f"warn {path}: what is stored can be read, but nothing can be written: {os.strerror(code)}"
    assert main(["doctor", "--storage", str(tmp_path)]) == 1  # nothing to read there
    assert main(["doctor", "--storage", str(tmp_path / "new")]) == 1
    assert os.strerror(code) in capsys.readouterr().err
    assert [found.name for found in tmp_path.iterdir()] == ["storage"]


def test_storage_in_use(tmp_path, capsys):
    key, value, buffer = ObjectKey(bytes(32), "full", "cell"), b"value", bytearray(5)
    storage = FileStorage(tmp_path)
    assert storage.put(key, memoryview(value))
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", "--storage", str(tmp_path)]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert storage.get(key, memoryview(buffer))
    assert buffer == value


def test_storage_of_someone_else(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("theirs")
    assert main(["doctor", "--storage", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_storage_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("not a directory")
    assert main(["doctor", "--storage", str(path)]) == 1
    assert "Not a directory" in capsys.readouterr().err
    assert path.read_text() == "not a directory"


def test_storage_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("not a directory")
    assert main(["doctor", "--storage", str(tmp_path / "file" / "folder")]) == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["put", "get"])
def test_storage_that_loses(broken, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FileStorage, broken, lambda self, key, buffer: False)
    assert main(["doctor", "--storage", str(tmp_path)]) == 1
    assert "failed to " in capsys.readouterr().err


def test_storage_in_use_that_takes_no_probe(tmp_path, capsys, monkeypatch):
    """A disk with room for a secret, but not for a value: serving reads, and a quota frees room."""
    FileStorage(tmp_path)
    monkeypatch.setattr(FileStorage, "put", lambda self, key, buffer: False)
    assert main(["doctor", "--storage", str(tmp_path)]) == 0
    said = lines(capsys.readouterr().out)["storage"]
    assert said.startswith(
        f"warn {tmp_path}: what is stored can be read, but nothing can be written: a probe value of 1"
    )


def no_gpu() -> bool:
    try:
        return not jax.devices("gpu")
    except RuntimeError:
        return True


@pytest.mark.skipif("no_gpu() is False", reason="there is a GPU")
def test_platform_that_is_absent(capsys):
    assert main(["doctor", "--platform", "gpu", "--mesh", "1,1,1"]) == 1
    found = lines(capsys.readouterr().out)
    assert found["devices"].startswith("FAIL")
    assert "gpu" in found["devices"]
    assert found["mesh"].startswith("FAIL")


def test_package_that_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL, "no-such-package", "models")
    assert main(["doctor"]) == 0
    assert lines(capsys.readouterr().out)["no-such-package"] == "warn missing: pip install 'jaxcache[models]'"


def test_json(tmp_path, capsys):
    assert main(["doctor", "--platform", "cpu", "--mesh", "9,1,1", "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [finding["check"] for finding in report["findings"] if finding["status"] == "FAIL"] == ["mesh"]

    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    assert json.loads((tmp_path / "doctor.json").read_text())["ok"] is True
    assert lines(capsys.readouterr().out)["jax"].startswith("ok")


def test_every_command_says_what_it_does(capsys):
    assert "doctor" in commands()
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(command.HELP in out for command in commands().values())


def test_as_a_program():
    command = [sys.executable, "-m", "jaxcache", "doctor", "--platform", "cpu", "--mesh", "3,1,1"]
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs 3 devices, there are 2" in done.stderr

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jetway.tasks.artifacts import OnnxModel, file_sha256
from jetway.tasks.errors import ArtifactError, RemoteCommandError
from jetway.tasks.target.session import TargetSession, open_target

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _home(jetway_home: Path) -> None:
    pass


def make_file(folder: Path, size: int) -> tuple[OnnxModel, Path]:
    path = folder / "model file.onnx"
    path.write_bytes(os.urandom(size))
    return OnnxModel(sha256=file_sha256(path), size_bytes=size), path


@pytest.mark.parametrize("size", [0, 1, 32_704, 9 * MIB + 7])
def test_push_and_pull_bring_the_same_bytes(session: TargetSession, tmp_path: Path, size: int) -> None:
    handle, path = make_file(tmp_path, size)
    seen: list[tuple[int, int]] = []
    remote = session.push(handle, path, lambda done, total: seen.append((done, total)))
    assert Path(remote).read_bytes() == path.read_bytes()
    assert seen[-1:] == ([(size, size)] if size else [])
    session.pull(remote, tmp_path / "back" / "model.onnx", handle.sha256)
    assert (tmp_path / "back" / "model.onnx").read_bytes() == path.read_bytes()
    assert os.listdir(tmp_path / "back") == ["model.onnx"]


@pytest.mark.serial
def test_what_is_there_is_not_sent_again(session: TargetSession, tmp_path: Path) -> None:
    handle, path = make_file(tmp_path, 30 * MIB)
    remote = Path(session.push(handle, path))
    written = remote.stat().st_ino
    seen: list[int] = []
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        session.push(handle, path, lambda done, total: seen.append(done))
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.5
    assert not seen
    assert remote.stat().st_ino == written


def test_two_pushes_of_one_file_at_once(session: TargetSession, tmp_path: Path) -> None:
    handle, path = make_file(tmp_path, 8 * MIB)
    with ThreadPoolExecutor(2) as pool:
        remotes = list(pool.map(lambda _: session.push(handle, path), range(2)))
    assert remotes[0] == remotes[1]
    assert file_sha256(Path(remotes[0])) == handle.sha256
    assert not list(Path(remotes[0]).parent.glob("*.part"))


def test_push_refuses_a_file_that_is_not_its_handle(session: TargetSession, tmp_path: Path) -> None:
    handle, path = make_file(tmp_path, MIB)
    path.write_bytes(os.urandom(MIB))
    with pytest.raises(ArtifactError, match="does not match its digest"):
        session.push(handle, path)
    assert not blobs_of(session, handle.sha256)


def test_small_corrupt_blob_is_replaced_by_push(session: TargetSession, tmp_path: Path) -> None:
    handle, path = make_file(tmp_path, MIB)
    remote = Path(session.push(handle, path))
    remote.write_bytes(os.urandom(MIB))
    session.push(handle, path)
    assert file_sha256(remote) == handle.sha256


def test_pull_refuses_what_does_not_match(session: TargetSession, tmp_path: Path) -> None:
    handle, path = make_file(tmp_path, MIB)
    remote = session.push(handle, path)
    local = tmp_path / "out" / "model.onnx"
    with pytest.raises(ArtifactError, match="does not match"):
        session.pull(remote, local, "0" * 64)
    with pytest.raises(RemoteCommandError, match="No such file"):
        session.pull(remote + "x", local, handle.sha256)
    assert os.listdir(tmp_path / "out") == []


def test_corrupt_blob_is_refused_by_a_job(session: TargetSession, tmp_path: Path) -> None:
    handle, path = make_file(tmp_path, 5 * MIB)
    remote = Path(session.push(handle, path))
    flip_first_byte(remote)
    with pytest.raises(ArtifactError, match="Run the pipeline again"):
        session.run_job("trial", {"files": [{"onnx": str(remote)}]}, 10, lease=False)
    assert not remote.exists()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_connection_is_mended(
    sshd: Any, cutter: Callable[..., Cutter], tmp_path: Path, direction: str, agent_folder: Path
) -> None:
    handle, path = make_file(tmp_path, 12 * MIB)
    work_dir = str(tmp_path / "work")
    proxy = cutter(sshd, 5 * MIB)
    with open_target(proxy.target(work_dir=work_dir), agent_folder=agent_folder) as session:
        seen: list[int] = []
        if direction == "up":
            remote = session.push(handle, path, lambda done, total: seen.append(done))
            assert max(seen) == handle.size_bytes
        else:
            with open_target(sshd.target(work_dir=work_dir)) as direct:
                remote = direct.push(handle, path)
            session.pull(remote, tmp_path / "back", handle.sha256)
            assert file_sha256(tmp_path / "back") == handle.sha256
    assert proxy.cuts == 1
    assert file_sha256(Path(remote)) == handle.sha256
    assert os.listdir(Path(remote).parent) == [handle.sha256]


def test_a_cut_at_any_byte_leaves_no_partial_file(
    sshd: Any, cutter: Callable[..., Cutter], tmp_path: Path
) -> None:
    handle, path = make_file(tmp_path, MIB)
    for number, limit in enumerate((4_000, 60_000, 600_000, MIB + 3_000)):
        folder = tmp_path / str(number)
        proxy = cutter(sshd, limit)
        with open_target(proxy.target(work_dir=str(folder))) as session:
            remote = session.push(handle, path)
        assert file_sha256(Path(remote)) == handle.sha256
        assert os.listdir(folder / "blobs") == [handle.sha256]


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    return mount_disk("20m")


def test_full_disk_is_found_before_sending(sshd: Any, tmp_path: Path, small_disk: Path) -> None:
    handle, path = make_file(tmp_path, 30 * MIB)
    with (
        open_target(sshd.target(work_dir=str(small_disk))) as session,
        pytest.raises(RemoteCommandError, match=rf"needs {30 * MIB} bytes.* \d+ are free"),
    ):
        session.push(handle, path)
    assert os.listdir(small_disk / "blobs") == []


def test_disk_that_fills_while_sending(sshd: Any, tmp_path: Path, small_disk: Path) -> None:
    handle, path = make_file(tmp_path, 15 * MIB)

    def fill(done: int, total: int) -> None:
        if not (small_disk / "other").exists():
            (small_disk / "other").write_bytes(bytes(8 * MIB))

    with (
        open_target(sshd.target(work_dir=str(small_disk))) as session,
        pytest.raises(RemoteCommandError, match=rf"needs {15 * MIB} bytes.* \d+ are free"),
    ):
        session.push(handle, path, fill)
    assert os.listdir(small_disk / "blobs") == []


def test_work_dir_that_cannot_be_written(sshd: Any, tmp_path: Path) -> None:
    handle, path = make_file(tmp_path, MIB)
    (tmp_path / "file").write_text("in the way")
    with (
        open_target(sshd.target(work_dir=str(tmp_path / "file"))) as session,
        pytest.raises(RemoteCommandError, match="work_dir"),
    ):
        session.push(handle, path)


def test_noise_of_a_login_disturbs_nothing(noisy_sshd: Any, tmp_path: Path, agent_folder: Path) -> None:
    handle, path = make_file(tmp_path, MIB)
    with open_target(noisy_sshd.target(), agent_folder=agent_folder) as session:
        remote = session.push(handle, path)
        session.pull(remote, tmp_path / "back", handle.sha256)
        assert session.call("trial", {})["work_dir"]
        assert session.run_job("trial", {"steps": 2}, 10, lease=False)["work_dir"]
    assert file_sha256(tmp_path / "back") == handle.sha256


def flip_first_byte(path: Path) -> None:
    with path.open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))


def blobs_of(session: TargetSession, sha256: str) -> list[Path]:
    return list(Path(session.call("trial", {})["work_dir"], "blobs").glob(sha256 + "*"))


class Cutter:
    """A TCP proxy that cuts its first connection after so many bytes, and lets the others pass."""

    def __init__(self, sshd: Any, limit_bytes: int, folder: Path) -> None:
        self.sshd, self.left, self.cuts = sshd, limit_bytes, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.known_hosts = folder / f"known_hosts-{self.port}"
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {(sshd.folder / 'host_key.pub').read_text()}")
        threading.Thread(target=self.accept, daemon=True).start()

    def target(self, **changes: object) -> Any:
        return self.sshd.target(port=self.port, known_hosts=str(self.known_hosts), **changes)

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.sshd.port))
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self.forward, args=ends, daemon=True).start()

    def forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(16_384):
                sink.sendall(data)
                self.left -= len(data)
                if self.left <= 0 and self.cuts == 0:
                    self.cuts += 1
                    break
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def cutter(tmp_path: Path) -> Iterator[Callable[..., Cutter]]:
    cutters: list[Cutter] = []

    def start(sshd: Any, limit_bytes: int) -> Cutter:
        cutters.append(Cutter(sshd, limit_bytes, tmp_path))
        return cutters[-1]

    yield start
    for proxy in cutters:
        proxy.listener.close()

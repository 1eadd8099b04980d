"""Upload of a 200 MB file over loopback OpenSSH: Jetway's push beside scp and sha256sum, interleaved.

    python tests/benchmarks/upload.py [--mb 200] [--rounds 5]

Both connect anew, both use AES-128-GCM, and both end with a file whose digest was checked on the target.
"""

from __future__ import annotations

import argparse
import getpass
import os
import platform
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jetway.configs.schema import Target
from jetway.tasks.artifacts import OnnxModel, file_sha256
from jetway.tasks.target.session import open_target

CIPHER = "aes128-gcm@openssh.com"
#: Jetway may take as long as scp and sha256sum together, divided by this.
LEAST_RATIO = 0.9
UNCHANGED_LIMIT_S = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jetway upload ") as name:
        folder = Path(name)
        source = folder / "file.bin"
        source.write_bytes(os.urandom(arguments.mb * 1_000_000))
        with private_sshd(folder) as target:
            seconds = measure(folder, source, target, arguments.rounds)
    return report(seconds, arguments.mb)


def measure(folder: Path, source: Path, target: Target, rounds: int) -> dict[str, list[float]]:
    handle = OnnxModel(sha256=file_sha256(source), size_bytes=source.stat().st_size)
    remote = folder / "remote.bin"
    blob = folder / "work" / "blobs" / handle.sha256

    def push() -> None:
        with open_target(target) as session:
            session.push(handle, source)

    seconds: dict[str, list[float]] = {"scp": [], "sha256sum": [], "push": [], "push, unchanged": []}
    for _ in range(rounds):
        remote.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        seconds["scp"].append(timed(lambda: scp(folder, source, remote, target)))
        seconds["sha256sum"].append(timed(lambda: run("sha256sum", str(remote))))
        seconds["push"].append(timed(push))
        seconds["push, unchanged"].append(timed(push))
        assert file_sha256(blob) == handle.sha256
    return seconds


def report(seconds: dict[str, list[float]], megabytes: int) -> int:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rounds = [sum(pair) for pair in zip(seconds["scp"], seconds["sha256sum"], strict=True)]
    limit_s = statistics.median(rounds) / LEAST_RATIO
    print(f"{megabytes} MB over loopback OpenSSH, {CIPHER}, {len(rounds)} interleaved rounds")
    print(f"on {cpu_name()}, {os.cpu_count()} cores, {openssh_version()}\n")
    print(f"| {'what':<18} | median s | {'all s':<40} |\n|{'-' * 20}|---------:|{'-' * 42}|")
    for name, values in seconds.items():
        print(f"| {name:<18} | {median[name]:8.2f} | {' '.join(f'{v:.2f}' for v in values):<40} |")
    fast = median["push"] <= limit_s and median["push, unchanged"] <= UNCHANGED_LIMIT_S
    print(f"\nlimit (scp + sha256sum) / {LEAST_RATIO}: {limit_s:.2f} s; unchanged: {UNCHANGED_LIMIT_S} s")
    print("PASS" if fast else "FAIL")
    return 0 if fast else 1


def scp(folder: Path, source: Path, remote: Path, target: Target) -> None:
    options = [f"UserKnownHostsFile={folder / 'known_hosts'}", "IdentitiesOnly=yes", "BatchMode=yes"]
    arguments = [word for option in options for word in ("-o", option.replace(" ", "\\ "))]
    key = ["-i", str(target.identity_file), "-P", str(target.port), "-c", CIPHER, "-q", "-F", "/dev/null"]
    run("scp", *key, *arguments, str(source), f"{target.user}@127.0.0.1:{remote}")


def timed(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def private_sshd(folder: Path) -> Iterator[Target]:
    """An OpenSSH server of our own: own port, own keys, no system file touched."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        raise SystemExit("This benchmark needs OpenSSH's server: apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "user_key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    port = free_port()
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey \"{folder / 'host_key'}\"\n"
        f"AuthorizedKeysFile \"{folder / 'user_key.pub'}\"\nStrictModes no\nPidFile none\nUsePAM no\n"
        "Subsystem sftp internal-sftp\n"
    )  # fmt: skip
    server = subprocess.Popen(
        [sshd, "-D", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        target = Target(
            name="openssh",
            host="127.0.0.1",
            port=port,
            user=getpass.getuser(),
            identity_file=str(folder / "user_key"),
            known_hosts=str(folder / "known_hosts"),
            work_dir=str(folder / "work"),
        )
        wait_until_up(target)
        yield target
    finally:
        server.terminate()
        server.wait()


def wait_until_up(target: Target) -> None:
    for _ in range(100):
        try:
            with open_target(target):
                return
        except Exception:
            time.sleep(0.1)
    raise SystemExit("The private sshd did not come up.")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def openssh_version() -> str:
    done = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True)
    return done.stderr.split(",")[0].strip()


if __name__ == "__main__":
    raise SystemExit(main())

"""nvpmodel, jetson_clocks, tegrastats, dmesg and sudo of a fake Jetson: one program under all of these names.

It reads and writes the board's files under JETWAY_SIMULATED_ROOT; ``board.json`` there says what the board can do. No
number of it was measured on a Jetson.
"""

import glob
import json
import os
import re
import sys
import time

ROOT = os.environ["JETWAY_SIMULATED_ROOT"]
REBOOT = """NVPM WARN: Golden image context is already created
NVPM WARN: Reboot required for changing to this power mode: {id}
NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:
"""
FREQUENCIES = (
    "/sys/class/devfreq/*/min_freq",
    "/sys/class/devfreq/*/max_freq",
    "/sys/class/devfreq/*/cur_freq",
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_*_freq",
)


def path(name):
    return os.path.join(ROOT, name.lstrip("/"))


def board():
    with open(path("board.json")) as file:
        return json.load(file)


def save(known):
    with open(path("board.json.part"), "w") as file:
        json.dump(known, file, indent=1)
    os.replace(path("board.json.part"), path("board.json"))


def log(*words):
    with open(path("commands.log"), "a") as file:
        file.write(" ".join(words) + "\n")


def write(name, value):
    with open(name, "w") as file:
        file.write(f"{value}\n")


def read(name):
    with open(name) as file:
        return file.read().strip()


def require_root():
    if os.geteuid() != 0 and "BOARD_SUDO" not in os.environ:
        sys.exit("NVPM ERROR: Error opening /var/lib/nvpmodel/status: 13")


def sudo(arguments):
    log("sudo", *arguments)
    if arguments[:1] != ["-n"]:
        sys.exit("sudo: a terminal is required to read the password")
    if not board().get("passwordless_sudo", True):
        sys.exit("sudo: a password is required")
    os.environ["BOARD_SUDO"] = "1"
    os.execvp(arguments[1], arguments[1:])


def nvpmodel(arguments):
    known = board()
    log("nvpmodel", *arguments)
    if arguments == ["-q"]:
        for line in known.get("query_noise", []):
            print(line)
        name = next(mode["name"] for mode in known["modes"] if mode["id"] == known["mode"])
        print("NV Power Mode: {}\n{}".format(name, known["mode"]))
    elif arguments == ["-p", "--verbose"]:
        print("NVPM VERB: Config file: /etc/nvpmodel.conf")
        for mode in known["modes"]:
            print("NVPM VERB: POWER_MODEL: ID={id} NAME={name}".format(**mode))
    elif arguments[:1] == ["-m"]:
        require_root()
        set_mode(known, int(arguments[1]))
    else:
        sys.exit("NVPM ERROR: unknown option")


def set_mode(known, number):
    mode = next(mode for mode in known["modes"] if mode["id"] == number)
    if mode.get("reboot"):
        sys.stdout.write(REBOOT.format(**mode))
        sys.stdout.flush()
        log("answer", sys.stdin.readline().strip())
        sys.exit("NVPM ERROR: optMask is 1, no request for power mode")
    time.sleep(known.get("slow_s", 0))
    if not known.get("ignores_modes"):
        save(dict(known, mode=number))
    for folder in glob.glob(path("/sys/class/devfreq/*")):
        write(folder + "/min_freq", mode["gpu_hz"] // 4)
        write(folder + "/cur_freq", mode["gpu_hz"] // 2)
        write(folder + "/max_freq", mode["gpu_hz"])
    for folder in glob.glob(path("/sys/devices/system/cpu/cpu*/cpufreq")):
        write(folder + "/scaling_min_freq", mode["cpu_khz"] // 4)
        write(folder + "/scaling_cur_freq", mode["cpu_khz"] // 2)
        write(folder + "/scaling_max_freq", mode["cpu_khz"])


def jetson_clocks(arguments):
    log("jetson_clocks", *arguments)
    require_root()
    files = sorted(name for pattern in FREQUENCIES for name in glob.glob(path(pattern)))
    if arguments[:1] == ["--store"]:
        if os.path.exists(arguments[1]):
            sys.stdout.write(f"File {arguments[1]} already exists. Can I overwrite it? Y/N:")
            sys.exit(0 if sys.stdin.readline().strip() == "Y" else 1)
        write(arguments[1], "\n".join(f"{name}:{read(name)}" for name in files))
    elif arguments[:1] == ["--restore"]:
        for line in read(arguments[1]).splitlines():
            write(*line.rsplit(":", 1))
    elif arguments[:1] == ["--show"]:
        print("".join(f"{name}: {read(name)}\n" for name in files), end="")
    elif not board().get("ignores_clocks"):
        for name in files:
            write(name, read(re.sub(r"(min|cur)_freq$", "max_freq", name)))


def tegrastats(arguments):
    interval_s = int(arguments[arguments.index("--interval") + 1]) / 1000.0
    while True:
        print(board()["tegrastats"], flush=True)
        time.sleep(interval_s)


def dmesg(arguments):
    lines = board().get("kernel_log", [])
    if lines is None:
        sys.exit("dmesg: read kernel buffer failed: Operation not permitted")
    print("".join(line + "\n" for line in lines), end="")


if __name__ == "__main__":
    globals()[os.path.basename(sys.argv[0])](sys.argv[1:])

"""Where a run comes from: its number, the code that made it, and the machines that it ran on."""

from __future__ import annotations

from jetway.tasks.report.material import RunMaterial
from jetway.tasks.target_info import TargetInfo


def origin_of(run: RunMaterial) -> dict[str, str]:
    """All of it, by what it is; the packages on one line."""
    packages = ", ".join(f"{name} {version}" for name, version in packages_of(run).items())
    return {**made_by(run), **({"packages": packages} if packages else {})}


def made_by(run: RunMaterial) -> dict[str, str]:
    """All but the packages."""
    known = run.environment
    made = {
        "run": f"{run.name}, {run.run_id}",
        "commit of the project": known.get("git_commit", ""),
        "host": ", ".join(filter(None, (known.get("cpu"), known.get("platform")))),
    }
    targets = {f"target {name}": _facts(found.info) for name, found in run.targets.items() if found.info}
    return {key: value for key, value in {**made, **targets}.items() if value}


def packages_of(run: RunMaterial) -> dict[str, str]:
    """Versions of Python and of the packages that have a say, by name."""
    known = run.environment
    versions = {"Python": known.get("python", ""), **known.get("packages", {})}
    return {name: version for name, version in versions.items() if version}


def _facts(info: TargetInfo) -> str:
    engines = [f"{name} {engine.version}" for name, engine in info.engines.items() if engine.available]
    jetpack = [f"JetPack {info.jetpack}"] if info.jetpack else []
    mode = [f"power mode {info.power_mode}"] if info.power_mode else []
    return ", ".join([info.machine, info.os, *jetpack, f"kernel {info.kernel}", *mode, *engines])

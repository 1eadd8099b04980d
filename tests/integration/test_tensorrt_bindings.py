"""NVIDIA's real bindings, of wheels from PyPI, over libraries that do nothing: names, signatures and the passage of
callbacks are real, and nothing is built or run. They prove the project's table of the surface, the double's
signatures, and every call that the worker makes."""

import ast
import json
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import doubles
import pytest
from doubles import real_bindings, tensorrt_names

SURFACE = doubles.surface()
USES = [use for path in tensorrt_names.files() for use in tensorrt_names.read(path).uses]
#: Called through a variable, with these arguments by position.
INDIRECT = {"IOptimizationProfile.set_shape": 4, "IOptimizationProfile.set_shape_input": 4}


@pytest.fixture(scope="session", params=real_bindings.PACKAGES)
def bindings(request, tmp_path_factory):
    try:
        return real_bindings.Bindings(request.param, tmp_path_factory.getbasetemp() / "bindings")
    except real_bindings.NotAvailable as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def real(bindings):
    return bindings.describe()["names"]


@pytest.fixture(scope="session")
def double(bindings, tensorrt_double):
    return real_bindings.describe(tensorrt_double(bindings.version), "tensorrt")["names"]


def test_bindings_are_unpacked_once_however_many_ask(tmp_path, monkeypatch):
    def download(version):
        time.sleep(0.1)
        with zipfile.ZipFile(tmp_path / f"{len(list(tmp_path.glob('*.whl')))}.whl", "w") as wheel:
            wheel.writestr("tensorrt_bindings/__init__.py", f"__version__ = {version!r}")
        return Path(wheel.filename)

    monkeypatch.setattr(real_bindings, "CACHE", tmp_path)
    monkeypatch.setattr(real_bindings, "_downloaded", download)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(real_bindings._unpacked, ["1.0"] * 4))
    assert len(set(folders)) == 1
    assert (folders[0] / "tensorrt_bindings" / "__init__.py").is_file()
    assert len(list(tmp_path.glob("*.whl"))) == 1


def named(description):
    """``{name: state}`` of everything that a description holds."""
    found = {}
    for owner, facts in description.items():
        found[owner] = "x"
        for name, value in facts.get("values", {}).items():
            found[f"{owner}.{name}"] = str(value)
        for name, member in facts.get("members", {}).items():
            found[f"{owner}.{name}"] = member.get("state", "x")
    return found


def without_nested(names):
    """``ILogger.Severity`` is a class inside another; its values are also those of the outer class."""
    return {
        name: state for name, state in names.items() if not name.startswith(("ILogger.Sev", "Logger.Sev"))
    }


def test_the_table_of_the_surface_is_that_of_the_real_bindings(bindings, real):
    table = {name: states[bindings.version] for name, states in SURFACE.items()}
    present = {name: state for name, state in table.items() if state != "-"}
    assert without_nested(named(real)) == without_nested(present)


def test_the_double_has_the_surface_of_the_real_bindings(real, double):
    assert named(double) == named(real)


def calls(overloads):
    """Every way to call, as tuples of parameter names: what may be left out is there and not there."""
    found = set()
    for parameters in overloads:
        names = tuple(name for name, _ in parameters)
        required = sum(not optional for _, optional in parameters)
        found.update(names[:count] for count in range(required, len(names) + 1))
    return found


def test_the_double_takes_no_call_that_the_real_bindings_refuse(real, double):
    compared = 0
    for owner, facts in double.items():
        for name, member in facts.get("members", {}).items():
            overloads = member.get("overloads", [])
            if member["kind"] == "method" and overloads != [[["_", False], ["__", False]]]:
                assert calls(overloads) <= calls(real[owner]["members"][name]["overloads"]), f"{owner}.{name}"
                compared += 1
    assert compared > 80


@pytest.mark.parametrize("owner", ["Builder", "Runtime", "OnnxParser", "Logger", "ILogger", "IProfiler"])
def test_the_double_is_constructed_like_the_real_bindings(real, double, owner):
    assert calls(double[owner]["overloads"]) == calls(real[owner]["overloads"])


def overloads_of(real, use):
    """What the real bindings take when the worker calls the name: a method's overloads, or a constructor's."""
    if use.owner == tensorrt_names.MODULE:
        return real[use.name]["overloads"]
    return real[use.owner]["members"][use.name]["overloads"]


def fits(overloads, count, keywords):
    """Whether a call with so many arguments by position and these by name is one of the overloads."""
    return any(set(names[count:]) == set(keywords) for names in calls(overloads) if len(names) >= count)


def called_uses(real):
    """The worker's calls of what this version has, functions of the module apart."""
    for use in USES:
        known = use.owner == tensorrt_names.MODULE and use.name in real
        if use.call is not None and (known or use.name in real.get(use.owner, {}).get("members", {})):
            yield use


def test_every_call_of_the_worker_fits_a_signature(real):
    checked = set()
    for use in called_uses(real):
        assert not any(argument for argument in use.call.args if isinstance(argument, ast.Starred)), use
        keywords = [keyword.arg for keyword in use.call.keywords]
        assert fits(overloads_of(real, use), len(use.call.args), keywords), use
        checked.add(f"{use.owner}.{use.name}")
    assert len(checked) > 40


def test_what_the_worker_calls_is_a_method_and_what_it_reads_is_none(real):
    for use in USES:
        member = real.get(use.owner, {}).get("members", {}).get(use.name)
        if member is None or use.name.startswith("__"):
            continue
        name = f"{use.owner}.{use.name}"
        if name in INDIRECT:
            assert fits(member["overloads"], INDIRECT[name], [])
        else:
            assert (member["kind"] == "method") == (use.call is not None), use
        assert not (use.stored and member["state"] == "ro"), use


def test_the_workers_questions_and_callbacks_work_on_the_real_bindings(bindings, real):
    script = real_bindings.ROOT / "tests" / "doubles" / "try_worker_on_bindings.py"
    found = json.loads(bindings.run(str(script)))
    weak = "FP16" in real["BuilderFlag"]["values"]
    assert found["has_flags"] == weak
    assert found["mask"] == sum(1 << value for value in real["TacticSource"]["values"].values())
    assert found["logged"] == ["something"]
    assert found["timed"] == [["Conv_0 + Relu_1", 0.5]]
    assert found.get("steps") == ([True, 0.5, 0.0] if "IProgressMonitor" in real else None)
    names = ["IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator"] if weak else []
    assert found.get("calibrated", []) == [[name, 4] for name in names]
    for base, methods in found["overridden"].items():
        for name, parameters in methods.items():
            assert tuple(parameters) in calls(real[base]["members"][name]["overloads"]), f"{base}.{name}"

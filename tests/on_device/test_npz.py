import io
import zipfile

import numpy as np
import pytest

from jetway.tasks.on_device import npz
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensors import NUMPY_NAMES, Tensor

ARRAYS = {
    **{name: np.arange(6).reshape(2, 3).astype(name) for name in NUMPY_NAMES.values()},
    "scalar": np.float32(2.5),
    "vector": np.zeros(1, np.float32),
    "nothing": np.zeros((0, 3), np.int64),
}


def test_what_numpy_saves_is_read(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **ARRAYS)
        found = npz.read(str(tmp_path / "a.npz"))
        assert set(found) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name].numpy(), array, strict=True)


def test_what_is_written_numpy_loads(tmp_path):
    npz.write(str(tmp_path / "a.npz"), {name: Tensor.of(np.asarray(array)) for name, array in ARRAYS.items()})
    with np.load(tmp_path / "a.npz") as file:
        assert set(file.files) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file[name], array, strict=True)


def test_newer_headers_are_read(tmp_path):
    data = io.BytesIO()
    np.lib.format.write_array(data, np.arange(3), version=(2, 0))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", data.getvalue())
    assert npz.read(str(tmp_path / "a.npz"))["x"].values() == [0, 1, 2]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3), np.float32, order="F"), "Fortran order"),
        (np.zeros(2, ">f4"), "the type '>f4'"),
        (np.array(["text"]), "the type '<U4'"),
    ],
)
def test_what_cannot_be_taken_is_said(tmp_path, array, words):
    np.savez(tmp_path / "a.npz", x=array)
    with pytest.raises(DeviceError, match=words) as caught:
        npz.read(str(tmp_path / "a.npz"))
    assert caught.value.kind == "bad_request"


@pytest.mark.parametrize(
    "content",
    [None, b"", b"# text", b"\x93NUMPY\x01\x00\xff\xff", b"\x93NUMPY\x01\x00\x02\x00{}"],
)
def test_no_file_of_arrays_is_refused_in_words(tmp_path, content):
    path = tmp_path / "a.npz"
    if content is not None:
        path.write_bytes(content)
        with pytest.raises(DeviceError, match="cannot be read as an"):
            npz.read(str(path))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    with pytest.raises(DeviceError, match="cannot be read as an"):
        npz.read(str(path))


def test_a_cut_off_array_is_refused(tmp_path):
    data = io.BytesIO()
    np.lib.format.write_array(data, np.arange(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", data.getvalue()[:-1])
    with pytest.raises(DeviceError, match="cut off"):
        npz.read(str(tmp_path / "a.npz"))


def test_a_type_that_numpy_lacks_is_refused(tmp_path):
    with pytest.raises(DeviceError, match="'y' is BF16"):
        npz.write(str(tmp_path / "a.npz"), {"y": Tensor("BF16", (1,), b"\0\0")})

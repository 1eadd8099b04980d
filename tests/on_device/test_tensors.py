import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from jetway.tasks.on_device import tensors
from jetway.tasks.on_device.errors import DeviceError

ARRAYS = {
    "image": np.random.default_rng(0).standard_normal((2, 3, 4), dtype=np.float32),
    "tokens": np.array([[1, -2], [3, 4]], dtype=np.int64),
    "mask": np.array([True, False]),
    "half": np.array([0.5, 2.0], dtype=np.float16),
    "bytes": np.arange(5, dtype=np.uint8),
    "scalar": np.array(3, dtype=np.int32),
    "nothing": np.zeros((0, 3), dtype=np.float64),
}


@pytest.fixture(autouse=True)
def job_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_array_equal(left[name], right[name])


def test_writer_makes_what_the_safetensors_package_reads(tmp_path):
    with tensors.TensorWriter("written.safetensors") as writer:
        for name, array in ARRAYS.items():
            writer.add(name, array)
    same(load_file("written.safetensors"), ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["written.safetensors"]


def test_reader_reads_what_the_safetensors_package_writes():
    save_file(ARRAYS, "given.safetensors")
    same(tensors.read_tensors("given.safetensors"), ARRAYS)


def test_arrays_are_mapped_and_not_loaded():
    save_file(ARRAYS, "given.safetensors")
    assert isinstance(tensors.read_tensors("given.safetensors")["image"].base, np.memmap)


def test_a_failing_block_leaves_no_file(tmp_path):
    def write_and_fail():
        with tensors.TensorWriter("half.safetensors") as writer:
            writer.add("image", ARRAYS["image"])
            raise KeyError("stop")

    with pytest.raises(KeyError):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"short", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"not json"])
def test_a_broken_file_is_named(tmp_path, data):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with pytest.raises(DeviceError, match=r"broken\.safetensors") as caught:
        tensors.read_tensors(str(path))
    assert caught.value.kind == "bad_request"


def test_a_type_that_numpy_lacks_is_refused_by_name():
    save_torch({"image": torch.zeros(2, dtype=torch.bfloat16)}, "given.safetensors")
    with pytest.raises(DeviceError, match=r"'image'.*BF16"):
        tensors.read_tensors("given.safetensors")

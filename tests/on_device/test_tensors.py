import mmap
import os
import struct

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
    read = tensors.read_tensors("given.safetensors")
    same({name: tensor.numpy() for name, tensor in read.items()}, ARRAYS)


def test_tensors_are_mapped_and_not_loaded():
    save_file(ARRAYS, "given.safetensors")
    image = tensors.read_tensors("given.safetensors")["image"]
    assert isinstance(image.data.obj, mmap.mmap)
    assert image.numpy().base is not None
    assert not image.numpy().flags.writeable


def test_a_tensor_of_an_array_is_its_bytes():
    for array in ARRAYS.values():
        tensor = tensors.Tensor.of(array)
        assert tensor.shape == array.shape
        assert bytes(tensor.data) == array.tobytes()
        np.testing.assert_array_equal(tensor.numpy(), array)
    across = ARRAYS["image"].transpose(2, 0, 1)
    np.testing.assert_array_equal(tensors.Tensor.of(across).numpy(), across)
    np.testing.assert_array_equal(tensors.Tensor.of(across.astype(">f4")).numpy(), across)


def test_rows_share_the_bytes_and_repeat_the_last_beyond_the_end():
    image = tensors.Tensor.of(ARRAYS["tokens"])
    np.testing.assert_array_equal(image.rows(1, 2).numpy(), [[3, 4]])
    np.testing.assert_array_equal(image.rows(0, 2).numpy(), ARRAYS["tokens"])
    np.testing.assert_array_equal(image.rows(1, 4).numpy(), [[3, 4]] * 3)


def test_types_that_numpy_lacks_are_bytes_all_the_same():
    save_torch({"image": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)}, "given.safetensors")
    image = tensors.read_tensors("given.safetensors")["image"]
    assert (image.dtype, image.shape, bytes(image.data)) == ("BF16", (2,), b"\x80\x3f\x00\xc0")


def test_a_cut_file_is_named():
    save_file(ARRAYS, "given.safetensors")
    os.truncate("given.safetensors", os.path.getsize("given.safetensors") - 8)
    with pytest.raises(DeviceError, match=r"given\.safetensors.*bytes") as caught:
        tensors.read_tensors("given.safetensors")
    assert caught.value.kind == "bad_request"


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
    with pytest.raises(DeviceError, match="BF16") as caught:
        tensors.read_tensors("given.safetensors")["image"].numpy()
    assert caught.value.kind == "bad_request"


def test_a_type_that_nothing_takes_is_refused_by_name(tmp_path):
    header = b'{"odd":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}'
    (tmp_path / "given.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(DeviceError, match=r"'odd'.*C64"):
        tensors.read_tensors("given.safetensors")

"""Fixtures for tests that use the doubles."""

import pytest

import doubles


@pytest.fixture(scope="session")
def doubles_folder(tmp_path_factory):
    """Where the doubles of libcudart are compiled, once a session."""
    return tmp_path_factory.mktemp("doubles")


@pytest.fixture(scope="session")
def cudart_double(doubles_folder):
    """``cudart_double(12060)``: the path of a compiled double of that CUDA's runtime."""
    return lambda cuda_version=12060: str(doubles.compile_cudart(doubles_folder, cuda_version))


@pytest.fixture(scope="session")
def tensorrt_double(doubles_folder):
    """``tensorrt_double("8.2.1.8", TENSORRT_DOUBLE_DLA_CORES=2)``: variables for a process that imports the double."""
    return lambda version, **settings: doubles.installation(doubles_folder, version, **settings)

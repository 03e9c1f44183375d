import sys

import numpy as np
import pytest
import torch

from data_pipelines.modalities.teacher_files import VectorError, read_vector
from save_jax.errors import UserError

VECTOR = np.arange(-3, 5, dtype=np.float32)


def test_numpy_files(tmp_path):
    np.save(tmp_path / "v.npy", VECTOR.astype(np.float64))
    found = read_vector(tmp_path / "v.npy", 8)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VECTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_torch_files(tmp_path, dtype, shape):
    torch.save(torch.from_numpy(VECTOR).to(dtype).reshape(shape), tmp_path / "v.pt")
    found = read_vector(tmp_path / "v.pt", 8)
    assert found.dtype == np.float32 and found.shape == (8,)
    np.testing.assert_array_equal(found, VECTOR)


def test_a_tensor_that_asks_for_gradients(tmp_path):
    torch.save(torch.ones(8, requires_grad=True), tmp_path / "v.pt")
    np.testing.assert_array_equal(read_vector(tmp_path / "v.pt", 8), np.ones(8))


@pytest.mark.parametrize("ending", [".npy", ".pt"])
@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.ones(7, np.float32), r"shape \[7\]"),
        (np.ones((2, 8), np.float32), r"shape \[2, 8\]"),
        (np.array([1, np.nan, np.inf, 0, 0, 0, 0, 0], np.float32), "2 of its numbers"),
        (np.full(8, 1e300), "8 of its numbers"),
        (np.zeros(8, np.float32), "all its numbers are zero"),
        (np.ones(8, np.complex64), "real numbers"),
    ],
)
def test_unusable_vectors(tmp_path, ending, values, found):
    path = tmp_path / f"v{ending}"
    np.save(path, values) if ending == ".npy" else torch.save(torch.from_numpy(values), path)
    with pytest.raises(VectorError, match=found):
        read_vector(path, 8)


@pytest.mark.parametrize("name", ["v.npy", "v.pt"])
@pytest.mark.parametrize("content", [b"", b"not a vector", bytes(200)])
def test_unreadable_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VectorError):
        read_vector(tmp_path / name, 8)


def test_a_file_cut_short(tmp_path):
    torch.save(torch.ones(1024), tmp_path / "v.pt")
    data = (tmp_path / "v.pt").read_bytes()
    (tmp_path / "v.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(VectorError, match="not a PyTorch tensor"):
        read_vector(tmp_path / "v.pt", 1024)


def test_something_else_in_the_file(tmp_path):
    torch.save({"vector": torch.ones(8)}, tmp_path / "v.pt")
    with pytest.raises(VectorError, match="found a dict"):
        read_vector(tmp_path / "v.pt", 8)
    np.save(tmp_path / "v.npy", np.array([{}, {}], object))
    with pytest.raises(VectorError, match="not a NumPy array"):
        read_vector(tmp_path / "v.npy", 8)


class _Runs:
    def __reduce__(self):
        return (print, ("code in a pickle was run",))


def test_pickles_are_not_run(tmp_path, capsys):
    torch.save(_Runs(), tmp_path / "v.pt")
    with pytest.raises(VectorError):
        read_vector(tmp_path / "v.pt", 8)
    assert "was run" not in capsys.readouterr().out


def test_an_absent_file(tmp_path):
    with pytest.raises(VectorError, match="does not exist"):
        read_vector(tmp_path / "v.npy", 8)


def test_without_torch(tmp_path, monkeypatch):
    (tmp_path / "v.pt").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install -e .*weights"):
        read_vector(tmp_path / "v.pt", 8)

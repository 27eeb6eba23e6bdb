import pytest
import torch

from bimask.devices import resolve_device, upload
from bimask.errors import SettingError


def test_devices_that_are_here():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", ""])
def test_devices_that_are_not_here_are_refused(name):
    with pytest.raises(SettingError, match=f"device '{name}' cannot be used"):
        resolve_device(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_take_the_dtype_of_their_company_and_tensors_keep_their_own(dtype):
    like = torch.zeros(2, dtype=dtype)
    assert upload([0.1, 0.2], like).dtype == upload(0.1, like).dtype == dtype
    assert upload([0.1, 0.2], like).tolist() == torch.tensor([0.1, 0.2], dtype=dtype).tolist()
    assert upload(0.1, like).shape == ()
    assert upload(torch.tensor([3, 1]), like).dtype == torch.int64

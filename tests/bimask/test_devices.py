import pytest
import torch

from bimask.devices import fast_bfloat16, resolve_device, upload
from bimask.errors import SettingError


def test_devices_that_are_here():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", ""])
def test_devices_that_are_not_here_are_refused(name):
    with pytest.raises(SettingError, match=f"device '{name}' cannot be used"):
        resolve_device(name)


def test_a_cpu_has_bfloat16_where_onednn_says_so(monkeypatch):
    for known in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=known: known)
        assert fast_bfloat16(torch.device("cpu")) is known
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fast_bfloat16(torch.device("cpu")) is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_take_the_dtype_of_their_company_and_tensors_keep_their_own(dtype):
    like = torch.zeros(2, dtype=dtype)
    assert upload([0.1, 0.2], like).dtype == upload(0.1, like).dtype == dtype
    assert upload([0.1, 0.2], like).tolist() == torch.tensor([0.1, 0.2], dtype=dtype).tolist()
    assert upload(0.1, like).shape == ()
    assert upload(torch.tensor([3, 1]), like).dtype == torch.int64

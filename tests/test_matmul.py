"""Products by the faster library are those of float32, forward and backward, and nothing stays changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from marval_rl.models import matmul
from marval_rl.models.matmul import QUICK, attention, onednn_is_faster, quick_products

CPU = torch.device("cpu")
LARGE = (CPU, 4096, 512)


@pytest.fixture
def on_amd(monkeypatch, tmp_path):
    """A machine whose library is chosen, whatever this one is; without AMX the products are exact everywhere."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)


def test_products_and_their_gradients_are_those_of_float32():
    torch.manual_seed(0)
    x, layer = torch.randn(256, 128, requires_grad=True), torch.nn.Linear(128, 192)
    with quick_products(*LARGE):
        y = layer(x)
        y.square().sum().backward()
    weight = layer.weight.double()
    exact = x.double() @ weight.T + layer.bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), 2 * exact @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "rows", "chosen"), [("cpu", 4096, True), ("cpu", 8, False), ("cuda", 4096, False)])
def test_only_large_products_on_the_cpu_change_library_and_only_meanwhile(on_amd, device, rows, chosen):
    with quick_products(torch.device(device), rows, 256):
        assert (torch.get_float32_matmul_precision() == QUICK) == chosen
    assert torch.get_float32_matmul_precision() == "highest"


def test_it_comes_back_after_an_error(on_amd):
    with pytest.raises(KeyError), quick_products(*LARGE):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_another_processor_keeps_its_library(monkeypatch, tmp_path):
    other = tmp_path / "cpuinfo"
    other.write_text("vendor_id : GenuineIntel\n")
    monkeypatch.setattr(matmul, "CPU_INFO", other)
    assert not onednn_is_faster.__wrapped__()


def test_attention_within_is_the_same_forward_and_backward(on_amd):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 9, 9))
    expected = F.scaled_dot_product_attention(q, k, v)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    with quick_products(*LARGE):
        found = attention(q, k, v, 0.0)
        own = torch.autograd.grad(found.square().sum(), (q, k, v))
    assert torch.equal(found, expected)
    for one, other in zip(own, gradients, strict=True):
        assert torch.equal(one, other)

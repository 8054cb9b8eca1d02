import pytest
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAEConfig
from snippets import blobs, classes, run


def dataset(n=200):
    return BaseDataset(blobs(n), torch.zeros(n))


def test_the_snippet_trains(tmp_path):
    torch.manual_seed(0)
    model = run("pythae", folder=str(tmp_path), dataset=dataset())["model"]
    assert 0.9 < model.criterion.gamma2 < 0.97  # eight steps from 1, and none by the evaluations


def test_the_loss_is_the_criterions_and_evaluation_moves_nothing():
    torch.manual_seed(0)
    model = classes("pythae")["BalancedVAE"](VAEConfig(input_dim=(1, 8, 8), latent_dim=4))
    output = model.train()({"data": blobs(50)})
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    mse = ((output.recon_x.reshape(50, 1, 8, 8) - blobs(50)) ** 2).mean().item()
    constant = 32 * torch.log(torch.tensor(2 * torch.pi)).item()
    assert output.recon_loss.item() == pytest.approx(32 * mse + constant, rel=1e-5)  # gamma2 is 1
    assert output.loss.item() == pytest.approx(output.recon_loss.item() + output.reg_loss.item(), rel=1e-5)
    moved = model.criterion.gamma2.item()
    assert moved == pytest.approx(0.99 + 0.01 * mse, rel=1e-6)
    model.eval()({"data": blobs(50)})
    assert model.criterion.gamma2.item() == moved


def test_gamma2_is_saved_and_loaded(tmp_path):
    kind = classes("pythae")["BalancedVAE"]
    model = kind(VAEConfig(input_dim=(1, 8, 8), latent_dim=4))
    with torch.no_grad():
        model.criterion.gamma2.fill_(0.25)
    model.save(str(tmp_path))
    assert kind.load_from_folder(str(tmp_path)).criterion.gamma2 == 0.25

import pytest
import torch
from snippets import blobs, classes, follow, run

DTYPES = (torch.float16, torch.bfloat16)


def make(**settings):
    torch.manual_seed(0)
    kind = classes("diffusers")["BalancedAutoencoderKL"]
    return kind(block_out_channels=(8,), norm_num_groups=4, sample_size=8, **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    model = make()
    with torch.no_grad():
        model.criterion.gamma2.fill_(0.12345678)
    model.save_pretrained(folder)
    return folder


def test_the_snippet_trains_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    loader = blobs(320, 3).split(32)
    names = run("diffusers", loader=loader, folder=tmp_path)
    vae, half = names["vae"], names["half"]
    assert half.dtype == torch.float16
    assert half.criterion.current_gamma2().dtype == torch.float32
    assert half.criterion.current_gamma2().item() == pytest.approx(vae.criterion.gamma2.item(), rel=2**-11)
    assert 0.9 < vae.criterion.gamma2 < 0.95  # ten steps from 1
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_gamma2_follows_the_training_steps():
    model = make().train()
    errors = [float(model.loss(x).mse) for x in blobs(60, 3).split(20)]
    assert model.criterion.gamma2.item() == pytest.approx(follow(1.0, errors), rel=1e-6)
    before = model.criterion.gamma2.clone()
    model.eval()
    model.loss(blobs(4, 3))
    with torch.no_grad():
        model.train().loss(blobs(4, 3))
    assert torch.equal(model.criterion.gamma2, before)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gamma2_is_whole_after_loading_in_half(saved, dtype, low_cpu_mem_usage):
    """diffusers sets tensors one by one in that dtype, past Module._apply."""
    kind = classes("diffusers")["BalancedAutoencoderKL"]
    model = kind.from_pretrained(saved, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert model.dtype == dtype
    loss = model.train().loss(blobs(4, 3).to(dtype))
    assert loss.gamma2.dtype == torch.float32
    assert loss.loss.isfinite()
    assert loss.gamma2.item() == pytest.approx(0.12345678, rel=2**-9)  # the file's value by way of that dtype, at worst
    loss.loss.backward()
    assert model.decoder.conv_out.weight.grad.isfinite().all()
    assert model.criterion.gamma2.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_from_half_and_loaded_in_full(saved, tmp_path, dtype):
    kind = classes("diffusers")["BalancedAutoencoderKL"]
    kind.from_pretrained(saved, torch_dtype=dtype).save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path)
    assert model.train().loss(blobs(4, 3)).gamma2.dtype == torch.float32
    assert model.criterion.gamma2.item() == pytest.approx(0.1234, rel=0.05)


def test_training_under_autocast():
    model = make().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    errors = []
    for x in blobs(32 * 15, 3).split(32):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(x)
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        errors.append(float(loss.mse))
    assert sum(errors[-3:]) < 0.8 * sum(errors[:3])
    assert model.criterion.gamma2.item() == pytest.approx(follow(1.0, errors), rel=1e-5)

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bvae
from bvae.config import Config
from bvae.engine.state import Moved
from bvae.errors import UserError
from bvae.run.checkpoint import BEST, LAST, prefixed, save_checkpoint
from bvae.run.folder import load
from bvae.two_stage import TwoStageVAE, read_config, to_uint8

CONFIG = Config(preset="shapes", side=8, scales=2, base=4, fc=8, latents=3, hidden=16)


def build(config=CONFIG, seed=0):
    """A model whose batch norms have seen something and whose weights are not at their start."""
    torch.manual_seed(seed)
    model = TwoStageVAE(config)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    for _ in range(3):
        mu, _ = model.stage1.encoder(torch.rand(16, config.channels, config.side, config.side))
        model.stage1.decoder(mu)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def images(n=5, channels=3, seed=0):
    shape = (n, channels, 8, 8)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---- encode, decode, reconstruct ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5, 300])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_ranges(n, channels):
    model = build(dataclasses.replace(CONFIG, channels=channels))
    x = images(n, channels)
    mu, log_sigma = model.encode(x)
    assert mu.shape == log_sigma.shape == (n, 3)
    for picture in (model.decode(mu), model.reconstruct(x), model.sample(n), model.sample(n, stage=1)):
        assert picture.shape == (n, channels, 8, 8)
        assert picture.dtype == torch.float32
        assert ((picture >= 0) & (picture <= 1)).all()
        assert not n or 0.05 < picture.mean() < 0.95
        assert not picture.requires_grad
        assert picture.is_contiguous()


def test_uint8_and_float_images_agree(model):
    x = images()
    for a, b in zip(model.encode(x), model.encode(x.float() / 255), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model.reconstruct(x), model.reconstruct((x.float() / 255).to(torch.float64)))


def test_images_are_taken_one_by_one(model):
    x = images(300)
    model.train()  # the methods must not use the statistics of the batch
    whole = model.encode(x)
    for i in (0, 255, 256, 299):
        for a, b in zip(model.encode(x[i : i + 1]), whole, strict=True):
            torch.testing.assert_close(a[0], b[i])
    assert not model.training
    assert not torch.allclose(whole[0][0], whole[0][1], atol=1e-4)


def test_nothing_of_the_model_changes_by_use(model):
    before = copy.deepcopy(model.state_dict())
    model.train()
    model.sample(3)
    model.train()
    model.reconstruct(images(), sample=True)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_encode_and_decode_are_the_networks(model):
    x = images()
    mu, log_sigma = model.encode(x)
    model.eval()
    with torch.no_grad():
        expected = model.stage1.encoder(x.float() / 255)
        picture = torch.sigmoid(model.stage1.decoder(expected[0]))
    torch.testing.assert_close(mu, expected[0])
    torch.testing.assert_close(log_sigma, expected[1])
    torch.testing.assert_close(model.reconstruct(x), picture)


def test_reconstruction_from_a_sample(model):
    x = images()
    mean, one, again, other = (
        model.reconstruct(x, **how) for how in ({}, {"sample": True}, {"sample": True}, {"sample": True, "seed": 1})
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(one, mean, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8, 4), (2, 3, 16, 16), (3, 8, 8), (2, 8, 8, 3)])
def test_wrong_images_are_told(model, shape):
    with pytest.raises(ValueError, match=r"images must be \[B,3,8,8\]"):
        model.encode(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integers_that_are_not_uint8_are_told(model, dtype):
    with pytest.raises(ValueError, match=r"floats in \[0,1\] or uint8"):
        model.encode(images().to(dtype))


@pytest.mark.parametrize("shape", [(2, 4), (3,), (2, 3, 1)])
def test_wrong_latents_are_told(model, shape):
    with pytest.raises(ValueError, match=r"z must be \[B,3\]"):
        model.decode(torch.zeros(shape))


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_samples_depend_on_the_seed_and_not_on_their_number(model, stage):
    some = model.sample(7, stage, seed=3)
    assert torch.equal(model.sample(7, stage, seed=3), some)
    assert not torch.allclose(model.sample(7, stage, seed=4), some, atol=1e-3)
    assert not torch.allclose(some[0], some[1], atol=1e-4)
    for n in (1, 3, 300):
        torch.testing.assert_close(model.sample(n, stage, seed=3)[:7], some[:n])
    torch.manual_seed(0)  # the global generator has no part in it
    assert torch.equal(model.sample(7, stage, seed=3), some)


def test_stage_1_is_standard_normal_and_stage_2_its_decoding(model):
    z = model.sample_latents(20_000, stage=1)
    assert z.mean(0).abs().max() < 5 / 20_000**0.5
    assert (z.var(0) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5
    with torch.no_grad():
        decoded = model.stage2.decoder(z[:50])
    torch.testing.assert_close(model.sample_latents(50, stage=2), decoded)


def test_seeds_of_sampling_and_reconstruction_are_apart(model):
    """With a posterior that is N(0,1), a sampled reconstruction must not be the sample of the same seed."""
    flat = copy.deepcopy(model)
    for head in (flat.stage1.encoder.mu, flat.stage1.encoder.log_sigma):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    assert not torch.allclose(flat.reconstruct(images(), sample=True), flat.sample(5, stage=1), atol=1e-4)


def test_without_a_second_stage():
    model = build(dataclasses.replace(CONFIG, epochs2=0))
    assert model.stage2 is None
    assert model.sample(2, stage=1).shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="no second stage"):
        model.sample(2)
    with pytest.raises(ValueError, match="second stage"):
        model.measure_rescale(torch.zeros(3, 3), torch.zeros(3, 3))


@pytest.mark.parametrize("stage", [0, 3])
def test_there_are_two_stages(model, stage):
    with pytest.raises(ValueError, match="stage must be 1 or 2"):
        model.sample(1, stage=stage)


# ---- rescale --------------------------------------------------------------------------------------------------------


def rescaling(**changes):
    return build(dataclasses.replace(CONFIG, rescale=True, **changes))


def test_measured_rescale_is_the_formula():
    model = rescaling()
    g = torch.Generator().manual_seed(1)
    mu = torch.randn(400, 3, generator=g) * torch.tensor([1.0, 0.5, 2.0]) + 1
    log_sigma = torch.randn(400, 3, generator=g) * 0.1 - 1
    measured = model.measure_rescale(mu, log_sigma, seed=5, samples=2000)
    with torch.no_grad():
        z_hat = model.stage2.decoder(model.stage2.encoder(mu)[0]).double().numpy()
    m, s = mu.double().numpy(), log_sigma.double().numpy()
    loss = (m.var(0).mean() - z_hat.var(0).mean()) / ((m - z_hat) ** 2).mean()
    scale = np.sqrt((m.var(0) + np.exp(2 * s).mean(0)).mean())
    std = model.sample_latents(2000, 2, seed=5, rescale=False).double().numpy().std(0).mean()
    assert measured["variance_loss"] == pytest.approx(loss, rel=1e-5)
    assert measured["scale_gen1"] == pytest.approx(scale, rel=1e-5)
    assert measured["scale_gen2"] == pytest.approx(scale / std, rel=1e-5)
    assert model.latent_scale.tolist() == pytest.approx([scale, scale / std], rel=1e-5)


@pytest.mark.parametrize(
    ("wanted", "loss", "applied"), [(True, 0.2501, True), (True, 0.25, False), (True, -1.0, False), (False, 0.9, False)]
)
@pytest.mark.parametrize("stage", [1, 2])
def test_rescale_is_applied_where_wanted_and_needed(wanted, loss, applied, stage):
    model = build(dataclasses.replace(CONFIG, rescale=wanted))
    model.latent_scale.copy_(torch.tensor([1.5, 3.0]))
    model.variance_loss.fill_(loss)
    plain = model.sample_latents(4, stage, rescale=False)
    scaled = plain * [1.5, 3.0][stage - 1]
    assert model.rescales == applied
    torch.testing.assert_close(model.sample_latents(4, stage), scaled if applied else plain)
    torch.testing.assert_close(model.sample_latents(4, stage, rescale=True), scaled)
    assert torch.equal(model.sample(4, stage, rescale=True), model.decode(model.sample_latents(4, stage, rescale=True)))
    assert torch.equal(model.sample(4, stage, rescale=False), model.decode(plain))


def test_an_unmeasured_rescale_does_nothing():
    model = rescaling()
    assert not model.rescales
    assert torch.equal(model.sample_latents(4, rescale=True), model.sample_latents(4, rescale=False))


def test_rescaled_samples_have_the_variance_of_the_law():
    model = rescaling()
    g = torch.Generator().manual_seed(1)
    mu, log_sigma = torch.randn(500, 3, generator=g), torch.full((500, 3), -1.0)
    model.measure_rescale(mu, log_sigma)
    law = (mu.var(0, correction=0) + torch.e**-2).mean().item()
    for stage in (1, 2):
        std = model.sample_latents(10_000, stage, seed=9, rescale=True).std(0).mean().item()
        assert std == pytest.approx(law**0.5, rel=0.03)


# ---- saved and loaded -----------------------------------------------------------------------------------------------


def same_model(a, b):
    assert a.config == b.config
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in a.state_dict().items())
    x = images()
    assert torch.equal(a.reconstruct(x), b.reconstruct(x))
    assert torch.equal(a.sample(3), b.sample(3))


@pytest.fixture
def saved(tmp_path):
    model = rescaling(kl_weight="auto", l2=1e-3, l2_on=("encoder.downsample",))
    model.latent_scale.copy_(torch.tensor([1.5, 3.0]))
    model.variance_loss.fill_(0.5)
    model.save_pretrained(tmp_path / "deep" / "model")
    return model, tmp_path / "deep" / "model"


def test_save_and_load_give_the_same_model(saved):
    model, folder = saved
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]
    for loaded in (TwoStageVAE.from_pretrained(folder), TwoStageVAE.from_pretrained(str(folder)), bvae.load(folder)):
        assert not loaded.training
        same_model(loaded, model)
    model.save_pretrained(folder)  # over what is there
    same_model(load(folder), model)


def test_a_model_in_training_can_be_saved(tmp_path):
    model = build().to(memory_format=torch.channels_last)
    Moved(model.stage1, {})
    model.save_pretrained(tmp_path)
    same_model(load(tmp_path), model)


def test_without_a_second_stage_it_is_saved_as_that(tmp_path):
    model = build(dataclasses.replace(CONFIG, epochs2=0))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).stage2 is None


def test_a_runs_checkpoints(saved):
    model, folder = saved
    newer, best = build(model.config, seed=1), build(model.config, seed=2)
    (folder / LAST).parent.mkdir()
    with pytest.raises(UserError, match=BEST):
        load(folder, checkpoint="best")
    for path, m in ((LAST, newer), (BEST, best)):
        save_checkpoint(folder / path, {**prefixed(m.state_dict(), "model"), "step.rng": torch.zeros(2)}, {})
    same_model(load(folder), newer)
    same_model(load(folder, checkpoint="best"), best)
    same_model(TwoStageVAE.from_pretrained(folder), model)
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-1])
    with pytest.raises(UserError, match=LAST):  # and not the older model beside it
        load(folder)


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (remove("stage1.encoder.conv0.bias"), ["stage1.encoder.conv0.bias is missing"]),
        (remove("latent_scale"), ["latent_scale is missing"]),
        (put("stage3.weight", torch.zeros(1)), ["unexpected tensor stage3.weight"]),
        (put("stage1.decoder.conv.bias", torch.zeros(4)), ["stage1.decoder.conv.bias is [4]", "needs [3]"]),
        (put("stage2.encoder.mu.bias", torch.zeros(3, 1)), ["stage2.encoder.mu.bias is [3, 1]"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, texts):
    _, folder = saved
    edit(folder / "model.safetensors", change)
    with pytest.raises(UserError) as caught:
        load(folder)
    for text in (str(folder / "model.safetensors"), *texts):
        assert text in str(caught.value)


def test_another_configuration_does_not_fit(saved):
    _, folder = saved
    values = json.loads((folder / "config.json").read_text())
    values["config"]["latents"] = 5
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"model\.safetensors: tensor .* the configuration needs"):
        load(folder)


def test_truncated_or_foreign_weights(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:1000], whole[:-1], whole + b"x", pickle.dumps({"a": 1}), bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors: truncated or not a safetensors file") as caught:
            load(folder)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: there is no such file"):
        load(folder)
    path.mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or not a safetensors file"):
        load(folder)


def test_a_flipped_bit_in_the_weights_is_noticed(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: its content does not match"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"model": "bvae"}', b'{"config": 5}', b'{"config": []}', b"\xff\xfe\x00", b"{}" * 2],
)
def test_a_damaged_config(saved, content):
    _, folder = saved
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_settings_of_another_version_are_named(saved):
    _, folder = saved
    values = json.loads((folder / "config.json").read_text())
    values["config"]["attention"] = True
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json: unknown setting 'attention'"):
        read_config(folder)


def test_a_folder_that_is_not_there(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="not a run or a saved model") as caught:
            load(folder)
        assert str(folder) in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        load(tmp_path / "file")


def test_saving_where_it_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="cannot write"):
            build().save_pretrained(folder)
    assert (tmp_path / "file").read_text() == ""


def test_half_precision_weights_are_taken(saved):
    model, folder = saved
    edit(folder / "model.safetensors", lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    loaded = load(folder)
    assert all(t.dtype == torch.float32 for t in loaded.state_dict().values())
    torch.testing.assert_close(loaded.sample(2), model.sample(2), rtol=0.02, atol=0.02)


def test_to_uint8_rounds_and_turns_to_height_width_channels():
    x = torch.tensor([-0.5, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 1.5]).view(1, 2, 3, 1).expand(1, 2, 3, 4)
    assert to_uint8(x).shape == (1, 3, 4, 2)
    assert to_uint8(x)[0, :, 0, :].tolist() == [[0, 1], [0, 255], [0, 255]]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert np.array_equal(to_uint8(every.float() / 255)[0, ..., 0], every[0, 0].numpy())

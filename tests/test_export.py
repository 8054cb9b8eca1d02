"""The exported programs run without bvae's code, on any batch size, and are kept only if they agree with the model."""

import copy
import io
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bvae import export as exporting
from bvae.config import Config
from bvae.errors import UserError, run_command
from bvae.export import FORMATS, Format, export, main
from bvae.two_stage import TwoStageVAE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TwoStageVAE(Config(preset="shapes", side=4, scales=1, base=4, fc=8, latents=3, hidden=16, rescale=True))
    for _ in range(3):
        mu, _ = model.stage1.encoder(torch.rand(16, 3, 4, 4))
        model.stage1.decoder(mu)
    model.variance_loss.fill_(0.5)
    model.latent_scale.copy_(torch.tensor([1.5, 1.0]))
    return model.eval()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A model's folder, exported in both formats by the command line."""
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder)
    for kind in FORMATS:
        main([str(folder), "--format", kind])
    return folder


def inputs(n):
    g = torch.Generator().manual_seed(n)
    return torch.rand(n, 3, 4, 4, generator=g), torch.randn(n, 3, generator=g)


def call(path, x):
    if path.suffix == ".pt2":
        with torch.no_grad():
            got = torch.export.load(path).module()(x)
        return [got] if isinstance(got, torch.Tensor) else list(got)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return [torch.from_numpy(y) for y in session.run(None, {given.name: x.numpy()})]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_files_are_the_model_at_any_batch_size(model, run, kind):
    folder = run / "export" / kind
    about = json.loads((folder / "export.json").read_text())
    for n in (1, 5, 33):
        x, z = inputs(n)
        for got, want in zip(call(folder / about["encoder"]["file"], x), model.encode(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        (images,) = call(folder / about["decoder"]["file"], z)
        torch.testing.assert_close(images, model.decode(z), rtol=1e-4, atol=1e-5)
    assert about["encoder"]["inputs"]["images"] == {"dtype": "float32", "shape": ["batch", 3, 4, 4], "range": [0, 1]}
    assert about["decoder"]["inputs"]["z"]["shape"] == ["batch", 3]
    assert about["gen1_scale"] == 1.5
    assert 0 <= about["encoder"]["largest_difference"] < 1e-4
    assert sorted(f.name for f in folder.iterdir()) == sorted(
        ["export.json", about["encoder"]["file"], about["decoder"]["file"]]
    )


def test_the_onnx_file_describes_itself(run):
    import onnx

    file = onnx.load(run / "export" / "onnx" / "encoder.onnx")
    assert [v.name for v in file.graph.input] == ["images"]
    assert [v.name for v in file.graph.output] == ["mu", "log_sigma"]
    assert {node.domain for node in file.graph.node} <= {"", "ai.onnx"}
    assert not {"BatchNormalizationTraining", "Dropout"} & {node.op_type for node in file.graph.node}
    (about,) = (p.value for p in file.metadata_props if p.key == "bvae")
    assert json.loads(about)["encoder"]["inputs"]["images"]["range"] == [0, 1]


def test_the_documents_snippet(run, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)
    monkeypatch.chdir(run)
    names = {}
    exec(snippet, names)
    assert names["again"].shape == (8, 3, 4, 4)


# ---- refusals, with stand-ins for the exporters ---------------------------------------------------------------------


def exact(part):
    return lambda x: exporting.as_arrays(part.module(x))


def stand_in(monkeypatch, make=lambda part, text: b"data", run=None):
    parts = []

    def keep(part, text):
        parts.append(part)
        return make(part, text)

    opened = run or (lambda part: exact(part))
    monkeypatch.setitem(FORMATS, "torch", Format(".pt2", (), keep, lambda data: opened(parts[-1])))


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main(list(argv)))
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert err.count("\n") == 1, err
    assert not out
    return err


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def off_by(error):
    def run(part):
        def call(x):
            first, *rest = exact(part)(x)
            return [first + np.float32(error), *rest]

        return call

    return run


@pytest.mark.parametrize("error", [1e-3, np.nan])
def test_outputs_that_differ_are_refused_and_nothing_is_written(monkeypatch, capsys, saved, error):
    stand_in(monkeypatch, run=off_by(error))
    err = refused(capsys, str(saved), "--format", "torch")
    assert "the exported encoder differs from the model" in err
    assert not (saved / "export").exists()


def test_a_small_difference_is_kept_and_told(monkeypatch, capsys, saved):
    stand_in(monkeypatch, run=off_by(3e-5))
    main([str(saved), "--format", "torch", "--out", str(saved / "x")])
    about = json.loads((saved / "x" / "export.json").read_text())
    assert about["encoder"]["largest_difference"] == pytest.approx(3e-5, rel=0.1)
    assert "differs from the model by at most 3.0e-05" in capsys.readouterr().out
    assert (saved / "x" / "decoder.pt2").read_bytes() == b"data"


def test_a_deterministic_encoder_has_one_output(monkeypatch, model, tmp_path):
    class MeanOnly(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return self.encoder(x)[0]

    other = copy.deepcopy(model)
    other.stage1.encoder = MeanOnly(other.stage1.encoder)
    stand_in(monkeypatch)
    assert list(export(other, "torch", tmp_path)["encoder"]["outputs"]) == ["mu"]


def test_a_program_of_one_batch_size_is_refused(monkeypatch, capsys, saved):
    stand_in(monkeypatch, run=lambda part: lambda x: [y[:1] for y in exact(part)(x)])
    assert "the encoder cannot be exported: it gives [1, 3] for a batch of 2" in refused(
        capsys, str(saved), "--format", "torch"
    )


def test_an_exporter_that_fails_is_told_in_one_line(monkeypatch, capsys, saved):
    def fail(part, text):
        raise NotImplementedError("no such operator\nmany lines\nmore")

    stand_in(monkeypatch, make=fail)
    err = refused(capsys, str(saved), "--format", "torch")
    assert "the encoder cannot be exported: NotImplementedError: no such operator" in err


def test_an_operator_of_ones_own_is_refused():
    """It would need its library wherever the program is read."""
    lib = torch.library.Library("bvae_test_export", "DEF")
    lib.define("twice(Tensor x) -> Tensor")
    lib.impl("twice", lambda x: x + x, "CompositeExplicitAutograd")

    class Twice(nn.Module):
        def forward(self, x):
            return torch.ops.bvae_test_export.twice(x)

    data = io.BytesIO()
    torch.export.save(torch.export.export(Twice(), (torch.ones(2),), strict=False), data)
    with pytest.raises(UserError, match=r"operators that its readers do not have: bvae_test_export\.twice"):
        exporting.run_torch(data.getvalue())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_told_first(monkeypatch, capsys, saved, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"--format onnx needs {package}: pip install 'bvae[onnx]'" in refused(capsys, str(saved), "--format", "onnx")


def test_a_folder_that_cannot_be_is_told_before_the_work(monkeypatch, capsys, saved):
    stand_in(monkeypatch, make=lambda part, text: pytest.fail("worked first"))
    (saved / "file").write_text("kept")
    for out in (saved / "file", saved / "file" / "deeper" / "still"):
        assert f"cannot write {out}" in refused(capsys, str(saved), "--format", "torch", "--out", str(out))
    assert (saved / "file").read_text() == "kept"


def test_an_interruption_leaves_what_was_there(monkeypatch, saved):
    stand_in(monkeypatch)
    main([str(saved), "--format", "torch"])
    folder = saved / "export" / "torch"
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def interrupt(part, text):
        raise KeyboardInterrupt

    stand_in(monkeypatch, make=interrupt)
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main([str(saved), "--format", "torch"]))
    assert caught.value.code == 130
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_the_callers_model_and_logging_stay_as_they_are(monkeypatch, model, tmp_path):
    stand_in(monkeypatch)
    half = TwoStageVAE(model.config).half().train()
    export(half, "torch", tmp_path)
    assert half.training
    assert half.latent_scale.dtype == torch.float16
    assert logging.root.manager.disable == logging.NOTSET
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)

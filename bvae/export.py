"""python -m bvae.export: writes a model's encoder and decoder as ONNX or torch.export programs of any batch size.

The encoder turns images into (mu, log_sigma), the decoder turns latents into images; export.json beside them tells
sizes and value ranges. Both are run and compared with the model before anything is kept. See docs/export.md.
"""

import argparse
import copy
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import bvae
from bvae.errors import UserError, run_command
from bvae.files import encode_json, exists, write_atomically, writing
from bvae.run.folder import load
from bvae.two_stage import TwoStageVAE

BATCHES = (1, 2, 7)  # sizes at which the outputs are compared
TOLERANCE = 1e-4  # of the largest difference, against the larger of 1 and the largest output; float32 throughout
OPSET = 18
MAX_ONNX_BYTES = 2**31 - 2**20  # of a file of protocol buffers, less what is no weight
DESCRIPTION = "export.json"

Outputs = list[np.ndarray]


class Encoder(nn.Module):
    """Images float32 [B,C,H,W] in [0,1] -> mu, log_sigma, each [B,k]; mu alone where the network is deterministic."""

    def __init__(self, model: TwoStageVAE) -> None:
        super().__init__()
        self.network = model.stage1.encoder

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.network(images)


class Decoder(nn.Module):
    """Latents float32 [B,k] -> images [B,C,H,W] in [0,1]."""

    def __init__(self, model: TwoStageVAE) -> None:
        super().__init__()
        self.network = model.stage1.decoder

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.network(z))


class Part(NamedTuple):
    """A module to export, with the names of its one input and of its outputs, and an example of the input."""

    module: nn.Module
    input: str
    outputs: tuple[str, ...]
    example: Callable[[int], Tensor]


def parts(model: TwoStageVAE) -> dict[str, Part]:
    generator = torch.Generator().manual_seed(0)
    c = model.config

    def images(n: int) -> Tensor:
        return torch.rand(n, *c.image_shape, generator=generator)

    def latents(n: int) -> Tensor:
        return torch.randn(n, c.latents, generator=generator)

    encoder = Encoder(model).eval()
    with torch.no_grad():
        means_only = isinstance(encoder(images(1)), Tensor)
    return {
        "encoder": Part(encoder, "images", ("mu",) if means_only else ("mu", "log_sigma"), images),
        "decoder": Part(Decoder(model).eval(), "z", ("images",), latents),
    }


# ---- the formats ----------------------------------------------------------------------------------------------------


def export_torch(part: Part, description: str) -> bytes:
    """A file for torch.export.load; `description` is its extra file export.json."""
    program = torch.export.export(
        part.module, (part.example(2),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={DESCRIPTION: description})
    return data.getvalue()


def run_torch(data: bytes) -> Callable[[Tensor], Outputs]:
    program = torch.export.load(io.BytesIO(data))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.nodes]
    operators = {t for t in targets if isinstance(t, torch._ops.OpOverload)}
    refuse_foreign(str(t) for t in operators if t.namespace not in ("aten", "prim", "prims"))
    module = program.module()
    return lambda x: as_arrays(module(x))


def export_onnx(part: Part, description: str) -> bytes:
    """A file of ONNX; `description` is its metadata `bvae`."""
    size = sum(t.numel() * t.element_size() for t in part.module.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise UserError(f"{size / 2**30:.1f} GiB of weights are more than one ONNX file holds (2 GiB): --format torch")
    exported = torch.onnx.export(
        part.module,
        (part.example(2),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[part.input],
        output_names=list(part.outputs),
        opset_version=OPSET,
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    proto = exported.model_proto
    importlib.import_module("onnx.helper").set_model_props(proto, {"bvae": description})
    return proto.SerializeToString()


def run_onnx(data: bytes) -> Callable[[Tensor], Outputs]:
    onnx, runtime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    model = onnx.load_model_from_string(data)
    onnx.checker.check_model(model)
    refuse_foreign(f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx"))
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda x: session.run(None, {given.name: x.numpy()})


class Format(NamedTuple):
    """packages: those it needs beside torch, of the extra `onnx`. make: a part's file. open: runs such a file."""

    suffix: str
    packages: tuple[str, ...]
    make: Callable[[Part, str], bytes]
    open: Callable[[bytes], Callable[[Tensor], Outputs]]


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxruntime", "onnxscript"), export_onnx, run_onnx),
    "torch": Format(".pt2", (), export_torch, run_torch),
}


# ---- exporting ------------------------------------------------------------------------------------------------------


def refuse_foreign(operators: Iterable[str]) -> None:
    if names := sorted(set(operators)):
        raise UserError(f"its graph needs operators that its readers do not have: {', '.join(names)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back the exporters' warnings: of packages that are not installed, of uses of torch by torch."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def as_arrays(outputs: Tensor | tuple[Tensor, ...]) -> Outputs:
    return [t.detach().numpy() for t in ((outputs,) if isinstance(outputs, Tensor) else outputs)]


def largest_difference(part: Part, run: Callable[[Tensor], Outputs]) -> float:
    """Between the module's outputs and those of `run`, over BATCHES, each against the larger of 1 and its largest."""
    worst = 0.0
    for n in BATCHES:
        x = part.example(n)
        with torch.no_grad():
            expected = as_arrays(part.module(x))
        for want, got in zip(expected, run(x), strict=True):
            if want.shape != got.shape:
                raise UserError(f"it gives {list(got.shape)} for a batch of {n}, and not {list(want.shape)}")
            difference = float(np.abs(want - got).max() / max(1.0, np.abs(want).max()))
            worst = max(worst, np.inf if np.isnan(difference) else difference)
    return worst


def describe(model: TwoStageVAE, kind: str, exported: Mapping[str, Part]) -> dict[str, Any]:
    """The contents of export.json."""
    c = model.config
    image = {"dtype": "float32", "shape": ["batch", *c.image_shape], "range": [0, 1]}
    latent = {"dtype": "float32", "shape": ["batch", c.latents]}
    values = {"images": image, "z": latent, "mu": latent, "log_sigma": latent}
    return {
        "format": kind,
        **{
            name: {
                "file": name + FORMATS[kind].suffix,
                "inputs": {part.input: values[part.input]},
                "outputs": {output: values[output] for output in part.outputs},
            }
            for name, part in exported.items()
        },
        "gen1_scale": model.latent_scale[0] if model.rescales else 1.0,
        "versions": {"bvae": bvae.__version__, "torch": torch.__version__},
    }


def export(model: TwoStageVAE, kind: str, out: Path) -> dict[str, Any]:
    """Writes encoder and decoder of `model` to `out` as FORMATS[kind]; returns what export.json holds.

    A copy of the model is used, on the CPU, in float32 and eval mode. The programs take any batch size from 1.

    Raises:
        UserError: a package is missing, a part cannot be exported, or its outputs differ from the model's by more than
            TOLERANCE. Nothing is written then.
    """
    form = FORMATS[kind]
    for package in form.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"--format {kind} needs {package}: pip install 'bvae[onnx]'") from error
    there = next(folder for folder in (out, *out.absolute().parents) if exists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out}: {there} is not a folder to write to")
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    exported = parts(model)
    description = describe(model, kind, exported)
    files: dict[str, bytes] = {}
    for name, part in exported.items():
        files[description[name]["file"]] = make(name, part, form, description)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        write_atomically(out / file, data)
    write_atomically(out / DESCRIPTION, encode_json(description, indent=2).encode())
    return description


def make(name: str, part: Part, form: Format, description: dict[str, Any]) -> bytes:
    """One part's file, once its outputs are those of the model; notes by how much they differ."""
    text = encode_json({name: description[name], "versions": description["versions"]})
    try:
        with torch.no_grad(), quiet():
            data = form.make(part, text)
        difference = largest_difference(part, form.open(data))
    except UserError as error:
        raise UserError(f"the {name} cannot be exported: {error}") from error
    except Exception as error:  # of many kinds, as the exporter's passes and a network of a user's own have them
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"the {name} cannot be exported: {type(error).__name__}: {reason}") from error
    if not difference <= TOLERANCE:
        raise UserError(f"the exported {name} differs from the model by {difference:.1e}, more than {TOLERANCE:.0e}")
    description[name]["largest_difference"] = difference
    return data


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bvae.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, or one that save_pretrained wrote")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the files; RUN/export/FORMAT by default")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    args = parser.parse_args(argv)
    out = args.out or args.run / "export" / args.format
    description = export(load(args.run, checkpoint=args.checkpoint), args.format, out)
    for name in ("encoder", "decoder"):
        entry = description[name]
        print(f"{name}: {out / entry['file']}, differs from the model by at most {entry['largest_difference']:.1e}")


if __name__ == "__main__":
    run_command(main)

"""Builds bvae's extension: one `bvae._C` for CPU and CUDA on LibTorch's stable ABI, `bvae._host` and `bvae._image`.

Environment:
    CUDA_HOME               the CUDA toolkit; otherwise /usr/local/cuda, then that of the nvcc on PATH.
    BVAE_CUDA=0             build without CUDA kernels even where nvcc is.
    BVAE_JPEG=0             leave JPEG files to Pillow even where libjpeg-turbo's header is (Debian: libjpeg-dev).
    BVAE_CUDA_ARCHS=80;90   compute capabilities to compile for (default 80;90;100). The newest is also kept as PTX.
    BVAE_REQUIRE_EXTENSION=1  fail instead of installing pure Python where there is no C++ compiler.
    CXX                     the C++ compiler.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
USUAL_CUDA = "/usr/local/cuda"
CXX_FLAGS = [
    "-O3",
    "-g0",  # Python's own flags ask for debug information, most of the file
    "-fvisibility=hidden",
    # The polynomials in csrc/arithmetic.h fuse where they mean to; anything else would differ between instruction sets.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def without_paths(includes: list[str]) -> list[str]:
    """Compiler flags under which an error names a file by its place in the project or in torch, not on this machine."""
    roots = {f"{ROOT.resolve()}/": "", **{f"{path}/": "" for path in includes}}
    return [f"-ffile-prefix-map={path}={name}" for path, name in roots.items()]


def say(text: str) -> None:
    print(f"bvae: {text}", file=sys.stderr, flush=True)


def find_compiler() -> str | None:
    """The C++ compiler's command, or None."""
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return None


def find_nvcc() -> Path | None:
    """The CUDA compiler, or None where there is none or BVAE_CUDA=0."""
    if os.environ.get("BVAE_CUDA") == "0":
        return None
    for home in (os.environ.get("CUDA_HOME"), USUAL_CUDA):
        if home and (nvcc := Path(home, "bin", "nvcc")).is_file():
            return nvcc
    # Last, for it is often a distribution's, of another version than the toolkit beside it.
    return Path(on_path) if (on_path := shutil.which("nvcc")) else None


def cuda_libraries(nvcc: Path) -> list[str]:
    """The folders of the toolkit's libraries. nvcc itself names them: the one on PATH may be a script or a link."""
    report = subprocess.run([str(nvcc), "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
    named = re.findall(r'"-L([^"]+)"', next(iter(re.findall(r"LIBRARIES=(.*)", report.stdout + report.stderr)), ""))
    beside = [str(nvcc.resolve().parents[1] / name) for name in ("lib64", "lib")]
    return [folder for folder in (*beside, *named) if Path(folder).is_dir()]


def find_jpeg(compiler: str) -> bool:
    """Whether to build with libjpeg-turbo. IJG's libjpeg has a header of the same name, but not all that is needed."""
    if os.environ.get("BVAE_JPEG") == "0":
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "jpeg.cpp")
        source.write_text(
            "#include <cstdio>\n#include <jpeglib.h>\n"
            "int main() { return jpeg_skip_scanlines(nullptr, LIBJPEG_TURBO_VERSION_NUMBER); }\n"
        )
        command = [*shlex.split(compiler), str(source), "-o", f"{folder}/jpeg", "-ljpeg"]
        return subprocess.run(command, capture_output=True).returncode == 0


def architectures() -> list[str]:
    """The compute capabilities to compile for, oldest first, such as ["80", "90"]."""
    wanted = re.split(r"[;,\s]+", os.environ.get("BVAE_CUDA_ARCHS", "80;90;100").strip())  # 100 needs CUDA 12.8
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in wanted):
        raise SystemExit(f"bvae: BVAE_CUDA_ARCHS must look like 80;90, got {';'.join(wanted)!r}")
    return sorted(wanted, key=lambda arch: int(re.sub(r"\D", "", arch)))


def code_flags(archs: list[str]) -> list[str]:
    """nvcc's flags for machine code of every architecture and PTX of the newest, for GPUs to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = re.sub(r"\D", "", archs[-1])  # PTX for an architecture with a suffix runs on that one alone
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def compile_cuda(nvcc: Path, folder: Path) -> list[str]:
    """Compiles every .cu file into `folder`; returns the objects."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = max(path.stat().st_mtime for pattern in ("*.h", "*.cuh") for path in CSRC.glob(pattern))
    objects = []
    for source in sorted(CSRC.glob("*.cu")):
        target = folder / f"{source.name}.o"
        place = str(source.relative_to(ROOT))  # a failed assertion on the device names it
        command = [str(nvcc), *NVCC_FLAGS, *code_flags(architectures()), "-c", place, "-o", str(target)]
        stamp = target.with_suffix(".command")
        newest = max(headers, source.stat().st_mtime)
        fresh = target.exists() and stamp.exists() and stamp.read_text() == shlex.join(command)
        if not fresh or target.stat().st_mtime < newest:
            say(shlex.join(command))
            if subprocess.run(command).returncode:
                raise SystemExit(
                    f"bvae: nvcc could not compile {source.name}; BVAE_CUDA_ARCHS (now {';'.join(architectures())}) "
                    "chooses the architectures, NVCC_CCBIN the host compiler, BVAE_CUDA=0 builds for the CPU only"
                )
            stamp.write_text(shlex.join(command))
        objects.append(str(target))
    return objects


def configure() -> dict:
    """What setup() needs to build the extension; nothing, with a word on why, where it cannot be built."""
    reason = None
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError:
        reason = "torch is not installed in the build environment"
    compiler = find_compiler()
    if reason is None and compiler is None:
        reason = "no C++ compiler was found"
    if reason is not None:
        if os.environ.get("BVAE_REQUIRE_EXTENSION") == "1":
            raise SystemExit(f"bvae: {reason}, and BVAE_REQUIRE_EXTENSION=1 asks for the extension")
        say(f"{reason}: installing pure Python, the ops will run as plain PyTorch (see bvae/reference.py)")
        return {}

    import pybind11

    unnamed = without_paths([pybind11.get_include()])
    if compiler != "c++":  # torch's own default
        os.environ["CXX"] = str(compiler)
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    nvcc = find_nvcc()
    cuda_version = archs = ""
    if nvcc is None:
        say("no nvcc: building for the CPU only (set CUDA_HOME to the CUDA toolkit, or PATH, for CUDA kernels)")
    else:
        report = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
        match = re.search(r"release ([\d.]+)", report)
        cuda_version = match.group(1) if match else "unknown"
        archs = ";".join(architectures())
        say(f"CUDA {cuda_version} from {nvcc}, for compute capabilities {archs}")
        if torch.version.cuda and torch.version.cuda.split(".")[0] != cuda_version.split(".")[0]:
            say(f"this torch uses CUDA {torch.version.cuda}: the driver that suits it may not run these kernels")

    class Build(BuildExtension):
        """Compiles the CUDA kernels with nvcc first and hands their objects to the linker."""

        def build_extensions(self):
            # Ninja knows what is out of date, a change from CPU-only to CUDA included; distutils' own test does not.
            self.force = True
            if nvcc is not None:
                objects = compile_cuda(nvcc, Path(self.build_temp, "cuda").absolute())
                next(e for e in self.extensions if e.name == "bvae._C").extra_objects = objects
            super().build_extensions()

    defines = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # 2.11, the oldest torch that may load this
    link = ["-Wl,--no-as-needed", "-ltorch"]  # else the weak CUDA stream symbol stays null on a CUDA torch
    if nvcc is not None:
        defines.append(("BVAE_WITH_CUDA", None))
        link += [f"-L{folder}" for folder in cuda_libraries(nvcc)]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    ops = CppExtension(
        "bvae._C",
        [
            str(path.relative_to(ROOT))
            for path in sorted(CSRC.glob("*.cpp"))
            if not path.name.startswith(("host", "image"))
        ],
        define_macros=defines,
        extra_compile_args={"cxx": [*CXX_FLAGS, *without_paths(include_paths()), "-std=c++20"]},
        extra_link_args=link,
        depends=[
            str(path.relative_to(ROOT)) for pattern in ("*.h", "*.cuh", "*.cu") for path in sorted(CSRC.glob(pattern))
        ],
        py_limited_api=True,
    )
    flags = " ".join([*CXX_FLAGS, *(["|", "nvcc", *NVCC_FLAGS] if nvcc else [])])
    host = Extension(
        "bvae._host",
        [str(path.relative_to(ROOT)) for path in sorted(CSRC.glob("host*.cpp"))],
        include_dirs=[pybind11.get_include()],
        define_macros=[
            ("BVAE_TORCH_VERSION", f'"{torch.__version__}"'),
            ("BVAE_CUDA_VERSION", f'"{cuda_version}"'),
            ("BVAE_ARCHITECTURES", f'"{archs}"'),
            ("BVAE_FLAGS", f'"{flags}"'),
        ],
        extra_compile_args={"cxx": ["-O2", "-g0", *unnamed, "-std=c++17", "-fvisibility=hidden", "-pthread"]},
        extra_link_args=["-pthread"],
        depends=["csrc/host_rows.h"],
        language="c++",
    )
    jpeg = find_jpeg(str(compiler))
    if not jpeg:
        say("no libjpeg-turbo to build with (Debian: libjpeg-dev): Pillow will decode JPEG files, which takes longer")
    image = Extension(
        "bvae._image",
        [str(path.relative_to(ROOT)) for path in sorted(CSRC.glob("image*.cpp"))],
        include_dirs=[pybind11.get_include()],
        define_macros=[("BVAE_JPEG", None)] if jpeg else [],
        libraries=["jpeg"] if jpeg else [],
        extra_compile_args={"cxx": ["-O3", "-g0", *unnamed, "-std=c++17", "-fvisibility=hidden"]},
        depends=["csrc/image_jpeg.h", "csrc/image_resize.h"],
        language="c++",
    )
    return {"ext_modules": [ops, host, image], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(**configure())

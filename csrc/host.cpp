// bvae._host: what the extension was built with, as a dict. Built per Python version, since pybind11 cannot be abi3.
#include <pybind11/pybind11.h>

#ifdef __clang__
#define BVAE_COMPILER "clang " __clang_version__
#else
#define BVAE_COMPILER "gcc " __VERSION__
#endif

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information of bvae's extension.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = BVAE_TORCH_VERSION;
    info["cuda"] = BVAE_CUDA_VERSION;  // empty: no CUDA kernels
    info["architectures"] = BVAE_ARCHITECTURES;
    info["compiler"] = BVAE_COMPILER;
    info["flags"] = BVAE_FLAGS;
    return info;
  });
}

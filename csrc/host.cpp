// bvae._host: what lives on the host and holds state: the streaming loader's files and threads; and what the extension
// was built with. Built per Python version, since pybind11 cannot be abi3.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "host_rows.h"

#ifdef __clang__
#define BVAE_COMPILER "clang " __clang_version__
#else
#define BVAE_COMPILER "gcc " __VERSION__
#endif

namespace py = pybind11;

namespace {

using Index = py::array_t<int64_t, py::array::c_style>;  // never converted: noconvert() below

// A stream together with the Python object that holds its order.
struct Stream {
  Stream(std::shared_ptr<bvae::RowFile> file, Index order, int64_t batch, const std::vector<uintptr_t>& slots,
         int threads)
      : order(order),
        rows(new bvae::RowStream(std::move(file), order.data(), order.size(), batch, pointers(slots), threads)) {}

  ~Stream() {
    if (rows->forked()) rows.release();
  }

  static std::vector<uint8_t*> pointers(const std::vector<uintptr_t>& slots) {
    std::vector<uint8_t*> out;
    for (const uintptr_t slot : slots) out.push_back(reinterpret_cast<uint8_t*>(slot));
    return out;
  }

  // Ready or not, the GIL is not held while waiting, and signals are looked at.
  std::optional<int64_t> next(bool wait) {
    while (true) {
      int64_t slot = 0;
      bvae::RowStream::Ready ready;
      {
        py::gil_scoped_release others;
        ready = rows->next(std::chrono::milliseconds(wait ? 50 : 0), &slot);
      }
      if (ready == bvae::RowStream::Ready::yes) return slot;
      if (ready == bvae::RowStream::Ready::ended) throw py::stop_iteration();
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!wait) return std::nullopt;
    }
  }

  Index order;
  std::unique_ptr<bvae::RowStream> rows;
};

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The streaming loader's threads, and the build information of bvae's extension.";
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = BVAE_TORCH_VERSION;
    info["cuda"] = BVAE_CUDA_VERSION;  // empty: no CUDA kernels
    info["architectures"] = BVAE_ARCHITECTURES;
    info["compiler"] = BVAE_COMPILER;
    info["flags"] = BVAE_FLAGS;
    return info;
  });

  py::register_exception<bvae::ReadError>(m, "ReadError", PyExc_OSError);
  py::class_<bvae::RowFile, std::shared_ptr<bvae::RowFile>>(m, "RowFile")
      .def(py::init<const std::string&, int64_t, int64_t, int64_t>(), py::arg("path"), py::arg("offset"),
           py::arg("row_bytes"), py::arg("rows"))
      .def(
          "read",
          [](const bvae::RowFile& file, const Index& index, uintptr_t to) {
            file.check_index(index.data(), index.size());
            py::gil_scoped_release others;
            file.read(index.data(), index.size(), reinterpret_cast<uint8_t*>(to));
          },
          py::arg("index").noconvert(), py::arg("to"))
      .def("check_unchanged", &bvae::RowFile::check_unchanged);
  py::class_<Stream>(m, "RowStream")
      .def(py::init<std::shared_ptr<bvae::RowFile>, Index, int64_t, const std::vector<uintptr_t>&, int>(),
           py::arg("file").none(false), py::arg("order").noconvert(), py::arg("batch"), py::arg("slots"), py::arg("threads"))
      .def("next", &Stream::next, py::arg("wait") = true)
      .def("release", [](Stream& stream) { stream.rows->release(); })
      .def("close", [](Stream& stream) {
        py::gil_scoped_release others;
        stream.rows->close();
      });

  // Threads that outlive the interpreter would write into buffers that are gone.
  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    py::gil_scoped_release others;
    bvae::RowStream::close_all();
  }));
}

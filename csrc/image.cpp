// bvae._image: the resize of images and, where libjpeg-turbo was there to build with, the decoding of JPEG files.
// Without torch, for the processes that decode. Built per Python version, since pybind11 cannot be abi3.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string_view>

#include "image_jpeg.h"

namespace py = pybind11;

namespace {

using Ints = py::array_t<int32_t, py::array::c_style>;   // never converted: noconvert() below
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using bvae::Taps;

std::unique_ptr<Taps> make_taps(int length, const Ints& first, const Ints& weights) {
  if (first.ndim() != 1 || weights.ndim() != 2 || first.shape(0) != weights.shape(0) || first.shape(0) < 1) {
    throw std::invalid_argument("taps are first [size] and weights [size, most]");
  }
  return std::make_unique<Taps>(length, static_cast<int>(first.shape(0)), static_cast<int>(weights.shape(1)),
                                first.data(), weights.data());
}

void check_channels(int channels) {
  if (channels != 1 && channels != 3) throw std::invalid_argument("an image has 1 or 3 channels");
}

std::unique_ptr<bvae::Resizer> make_resizer(const Taps& horizontal, const Taps& vertical, int channels) {
  check_channels(channels);
  return std::make_unique<bvae::Resizer>(horizontal, vertical, channels);
}

Bytes empty_result(const Taps& horizontal, const Taps& vertical, int channels) {
  return Bytes({vertical.size, horizontal.size, channels});
}

// The next rows [n, width, channels] of the image.
void add(bvae::Resizer& resizer, const Bytes& rows) {
  const int length = resizer.horizontal.length, channels = resizer.channels;
  if (rows.ndim() != 3 || rows.shape(1) != length || rows.shape(2) != channels ||
      rows.shape(0) > resizer.vertical.length - resizer.rows()) {
    throw std::invalid_argument("the rows must be [n, width, channels], and no more than the image has");
  }
  const uint8_t* from = rows.data();
  const size_t pitch = static_cast<size_t>(length) * static_cast<size_t>(channels);
  py::gil_scoped_release others;
  std::vector<uint8_t> row(pitch + resizer.beyond());
  for (py::ssize_t y = 0; y < rows.shape(0); ++y, from += pitch) {
    std::copy(from, from + pitch, row.data());
    resizer.add_row(row.data());
  }
}

Bytes finish(const bvae::Resizer& resizer) {
  if (resizer.rows() != resizer.vertical.length) throw std::invalid_argument("rows are missing");
  Bytes out = empty_result(resizer.horizontal, resizer.vertical, resizer.channels);
  uint8_t* to = out.mutable_data();
  py::gil_scoped_release others;
  resizer.finish(to);
  return out;
}

py::object decode_jpeg(const py::bytes& data, int width, int height, int left, int top, int channels,
                       const Taps& horizontal, const Taps& vertical) {
  if (left < 0 || top < 0 || horizontal.length > width - left || vertical.length > height - top) {
    throw std::invalid_argument("the crop must lie in the image");
  }
  check_channels(channels);
  Bytes out = empty_result(horizontal, vertical, channels);
  const std::string_view bytes = data;
  uint8_t* to = out.mutable_data();
  bool done = false;
  {
    py::gil_scoped_release others;
    done = bvae::decode_jpeg(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), {width, height, left, top},
                             horizontal, vertical, channels, to);
  }
  return done ? py::object(std::move(out)) : py::none();
}

}  // namespace

PYBIND11_MODULE(_image, m) {
  m.doc() = "The resize of images, and the decoding of JPEG files.";
  m.attr("JPEG") = bvae::kJpegVersion == nullptr ? py::object(py::none()) : py::object(py::str(bvae::kJpegVersion));
  py::class_<Taps>(m, "Taps")
      .def(py::init(&make_taps), py::arg("length"), py::arg("first").noconvert(), py::arg("weights").noconvert());
  py::class_<bvae::Resizer>(m, "Resizer")
      .def(py::init(&make_resizer), py::arg("horizontal"), py::arg("vertical"), py::arg("channels"),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
      .def("add", &add, py::arg("rows").noconvert())
      .def("finish", &finish);
  m.def("decode_jpeg", &decode_jpeg, py::arg("data"), py::arg("width"), py::arg("height"), py::arg("left"),
        py::arg("top"), py::arg("channels"), py::arg("horizontal"), py::arg("vertical"));
}

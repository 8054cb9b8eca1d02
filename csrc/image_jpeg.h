// Decoding of JPEG files by libjpeg-turbo, where bvae was built with it: only what a crop needs, shrunk row by row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "image_resize.h"

namespace bvae {

// libjpeg-turbo's version that this was compiled with, such as "2.1.5"; null without.
extern const char* const kJpegVersion;

struct JpegCrop {
  int width, height;  // size that the file must have
  int left, top;      // corner of the crop, whose size is that of the taps
};

// The crop of a JPEG file, resized: out [vertical.size, horizontal.size, channels]. channels: 3, or 1 of a grey file.
// Rows below the crop are not decoded.
//
// False, with nothing said of why, where the file is not entirely in order or not as told: somebody more patient may
// then have a look at it.
bool decode_jpeg(const uint8_t* data, size_t bytes, const JpegCrop& crop, const Taps& horizontal, const Taps& vertical,
                 int channels, uint8_t* out);

}  // namespace bvae

#include "image_jpeg.h"

#ifdef BVAE_JPEG

#include <csetjmp>
#include <cstdio>  // which jpeglib.h needs before it

#include <jpeglib.h>

#define BVAE_TEXT(x) #x
#define BVAE_QUOTED(x) BVAE_TEXT(x)

namespace bvae {

const char* const kJpegVersion = BVAE_QUOTED(LIBJPEG_TURBO_VERSION);

namespace {

constexpr size_t kAligned = 64;  // bytes of the widest vectors
constexpr int kRows = 16;  // at a time; libjpeg gives up to as many as two rows of chroma make

struct Handler {
  jpeg_error_mgr base;
  std::jmp_buf jump;
};

[[noreturn]] void give_up(j_common_ptr info) { std::longjmp(reinterpret_cast<Handler*>(info->err)->jump, 1); }

// Warnings too: whatever libjpeg makes up for a damaged file is not ours to pass on.
void hear(j_common_ptr info, int level) {
  if (level < 0) give_up(info);
}

void say_nothing(j_common_ptr) {}

// No object with a destructor lives here: an error jumps out of it.
bool decode(jpeg_decompress_struct* info, Handler* handler, const uint8_t* data, size_t bytes, const JpegCrop& crop,
            uint8_t* rows, size_t pitch, Resizer* resizer) {
  const int channels = resizer->channels;
  if (setjmp(handler->jump) != 0) return false;
  jpeg_create_decompress(info);
  jpeg_mem_src(info, data, bytes);
  jpeg_read_header(info, TRUE);
  if (static_cast<int64_t>(info->image_width) != crop.width || static_cast<int64_t>(info->image_height) != crop.height) {
    return false;
  }
  if (channels == 1 && info->jpeg_color_space != JCS_GRAYSCALE) return false;
  info->out_color_space = channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_start_decompress(info);
  if (info->output_components != channels) return false;
  const JDIMENSION top = static_cast<JDIMENSION>(crop.top), bottom = top + static_cast<JDIMENSION>(resizer->vertical.length);
  if (top > 0 && jpeg_skip_scanlines(info, top) != top) return false;
  JSAMPROW lines[kRows];
  for (int i = 0; i < kRows; ++i) lines[i] = rows + static_cast<size_t>(i) * pitch;
  while (info->output_scanline < bottom) {
    const JDIMENSION left = bottom - info->output_scanline;
    const JDIMENSION got = jpeg_read_scanlines(info, lines, left < kRows ? left : kRows);
    if (got == 0) return false;
    for (JDIMENSION i = 0; i < got; ++i) resizer->add_row(lines[i] + static_cast<size_t>(crop.left * channels));
  }
  return true;
}

}  // namespace

bool decode_jpeg(const uint8_t* data, size_t bytes, const JpegCrop& crop, const Taps& horizontal, const Taps& vertical,
                 int channels, uint8_t* out) {
  Resizer resizer(horizontal, vertical, channels);
  // libjpeg-turbo writes a row that is aligned to its vectors past the caches, from where it would have to be fetched
  // again: with all rows aligned a file takes more than twice as long. So none is.
  const size_t width = static_cast<size_t>(crop.width) * static_cast<size_t>(channels);
  const size_t pitch = (width + kAligned - 1) / kAligned * kAligned;
  std::vector<uint8_t> buffer(kRows * pitch + resizer.beyond() + 2 * kAligned);
  uint8_t* rows = buffer.data() + kAligned - reinterpret_cast<uintptr_t>(buffer.data()) % kAligned + 8;
  jpeg_decompress_struct info{};
  Handler handler{};
  info.err = jpeg_std_error(&handler.base);
  handler.base.error_exit = give_up;
  handler.base.emit_message = hear;
  handler.base.output_message = say_nothing;
  const bool done = decode(&info, &handler, data, bytes, crop, rows, pitch, &resizer);
  jpeg_destroy_decompress(&info);
  if (done) resizer.finish(out);
  return done;
}

}  // namespace bvae

#else

namespace bvae {

const char* const kJpegVersion = nullptr;

bool decode_jpeg(const uint8_t*, size_t, const JpegCrop&, const Taps&, const Taps&, int, uint8_t*) { return false; }

}  // namespace bvae

#endif

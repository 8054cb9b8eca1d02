// The resize of bvae/data/decoders/resize.py: weighted sums of neighbouring pixels in integers, exactly as it defines
// them, first along the rows, then along the columns. Plain C++; image.cpp binds it to Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace bvae {

// The weights that each of `size` results along one side gives to `length` pixels: [size, most], for the pixels from
// first[i] on, count[i] of them, in units of 2^-22. Throws std::invalid_argument where they lie outside.
class Taps {
 public:
  Taps(int length, int size, int most, const int32_t* first, const int32_t* weights);

  const int length, size, most;
  std::vector<int32_t> first, count, weights;
};

// An image on its way: given its rows from top to bottom, each is shrunk along its length at once and not kept.
class Resizer {
 public:
  // channels: 1 or 3. The taps must outlive it.
  Resizer(const Taps& horizontal, const Taps& vertical, int channels);

  // The next of vertical.length rows: horizontal.length pixels, and beyond() bytes behind them that may be read.
  void add_row(const uint8_t* row);
  size_t beyond() const { return 3 * static_cast<size_t>(horizontal.most) + 16; }
  int rows() const { return rows_; }  // added so far

  // All rows were added: out [vertical.size, horizontal.size, channels].
  void finish(uint8_t* out) const;

  const Taps &horizontal, &vertical;
  const int channels;

 private:
  const size_t line_;            // bytes of a row that was shrunk
  std::vector<int32_t> spread_;  // the horizontal weights as shrink_rgb reads them
  std::vector<uint8_t> shrunk_;  // [vertical.length, horizontal.size, channels], and 4 bytes
  int rows_ = 0;
};

}  // namespace bvae

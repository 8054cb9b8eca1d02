// The CPU loops. Included once per instruction set by cpu_default.cpp, cpu_avx2.cpp and cpu_avx512.cpp, which set
// the compiler's target first and BVAE_CPU_NAME; everything below is local to the including file. No pragma once.
//
// Elements pass through small blocks of the arithmetic type, which stay in the first-level cache: one loop converts,
// one computes, one converts back, and each of them is simple enough for the compiler to vectorise. The bytes of the
// loss's target are converted where they are used: a float a byte would be four times the traffic.

#include "adam.h"
#include "cpu.h"
#include "half.h"
#include "philox.h"

namespace bvae {
namespace {

constexpr int kBlock = 1024;  // elements of the loss at a time
constexpr int kTile = 256;    // latents at a time, a multiple of 4

// ---- conversions ---------------------------------------------------------------------------------------------------

// A byte as its fraction of 255; what already is A stays.
template <class A>
A fraction(uint8_t v) {
  if constexpr (sizeof(A) == 8) {
    return v / 255.0;
  } else {
    return unit_from_u8(static_cast<float>(v));
  }
}
template <class A>
A fraction(A v) {
  return v;
}

// n elements from `begin` on, as A: a pointer into the tensor where it already is A, else into `buffer`.
template <class A>
const A* load(DType type, const void* data, int64_t begin, int n, A* buffer) {
  if constexpr (sizeof(A) == 8) {
    if (type == DType::f64) return static_cast<const A*>(data) + begin;
  } else {
    if (type == DType::f32) return static_cast<const A*>(data) + begin;
  }
  switch (type) {
    case DType::f32: {
      const float* p = static_cast<const float*>(data) + begin;
      for (int i = 0; i < n; ++i) buffer[i] = static_cast<A>(p[i]);
      break;
    }
    case DType::f64: {
      const double* p = static_cast<const double*>(data) + begin;
      for (int i = 0; i < n; ++i) buffer[i] = static_cast<A>(p[i]);
      break;
    }
    case DType::bf16: {
      const uint16_t* p = static_cast<const uint16_t*>(data) + begin;
      for (int i = 0; i < n; ++i) buffer[i] = float_from_bf16(p[i]);
      break;
    }
    case DType::f16: {
      const uint16_t* p = static_cast<const uint16_t*>(data) + begin;
      for (int i = 0; i < n; ++i) buffer[i] = float_from_f16(p[i]);
      break;
    }
    case DType::u8: {
      const uint8_t* p = static_cast<const uint8_t*>(data) + begin;
      for (int i = 0; i < n; ++i) buffer[i] = fraction<A>(p[i]);
      break;
    }
  }
  return buffer;
}

// Where to write n results: into the tensor itself where its type is A, else into `buffer`, for `store`.
template <class A>
A* place(DType type, void* data, int64_t begin, A* buffer) {
  const bool same = type == (sizeof(A) == 8 ? DType::f64 : DType::f32);
  return same ? static_cast<A*>(data) + begin : buffer;
}

template <class A>
void store(DType type, void* data, int64_t begin, int n, const A* values) {
  if (type == DType::bf16) {
    uint16_t* p = static_cast<uint16_t*>(data) + begin;
    for (int i = 0; i < n; ++i) p[i] = bf16_from_float(static_cast<float>(values[i]));
  } else if (type == DType::f16) {
    uint16_t* p = static_cast<uint16_t*>(data) + begin;
    for (int i = 0; i < n; ++i) p[i] = f16_from_float(static_cast<float>(values[i]));
  }
}

// ---- the loss ------------------------------------------------------------------------------------------------------

// A sum in interleaved lanes, which are added up in double after every block: the order is fixed, so every instruction
// set gives the same bits. Adding element by element, not block by block, leaves nothing to store in between.
constexpr int kLanes = 64;

template <class A>
struct LaneSum {
  alignas(64) double wide[16] = {};

  // Adds term(place, lane) for the places [0, n) of a block: what the lane becomes.
  template <class F>
  void block(int n, F term) {
    alignas(64) A lanes[kLanes] = {};
    int64_t i = 0;  // not int: Python's -fwrapv lets an int wrap, and i + j would no longer count up
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] = term(i + j, lanes[j]);
    }
    for (int64_t j = 0; i + j < n; ++j) lanes[j] = term(i + j, lanes[j]);
    for (int j = 0; j < kLanes; j += 16) {
      for (int k = 0; k < 16; ++k) wide[k] += static_cast<double>(lanes[j + k]);
    }
  }

  double total() const {
    double sum = 0.0;
    for (const double w : wide) sum += w;
    return sum;
  }
};

// Calls f(recon, target, offset, n) for blocks of the elements [begin, end): recon as A, target as A or, read where it
// lies, as bytes.
template <class A, class F>
void by_blocks(DType recon_type, const void* recon, DType target_type, const void* target, int64_t begin, int64_t end,
               F f) {
  alignas(64) A recon_buffer[kBlock], target_buffer[kBlock];
  for (int64_t b = begin; b < end; b += kBlock) {
    const int n = static_cast<int>(end - b < kBlock ? end - b : kBlock);
    const A* r = load<A>(recon_type, recon, b, n, recon_buffer);
    if (target_type == DType::u8) {
      f(r, static_cast<const uint8_t*>(target) + b, b, n);
    } else {
      f(r, load<A>(target_type, target, b, n, target_buffer), b, n);
    }
  }
}

template <class A, bool logits>
double sse_range(DType recon_type, const void* recon, DType target_type, const void* target, int64_t begin,
                 int64_t end) {
  LaneSum<A> sum;
  by_blocks<A>(recon_type, recon, target_type, target, begin, end,
               [&sum]<class T>(const A* __restrict r, const T* __restrict t, int64_t, int n) {
                 sum.block(n, [r, t](int64_t i, A lane) {
                   return add_square(residual<logits>(r[i], fraction<A>(t[i])), lane);
                 });
               });
  return sum.total();
}

double sse(DType recon_type, const void* recon, DType target_type, const void* target, bool logits, int64_t begin,
           int64_t end) {
  if (recon_type == DType::f64) {
    return logits ? sse_range<double, true>(recon_type, recon, target_type, target, begin, end)
                  : sse_range<double, false>(recon_type, recon, target_type, target, begin, end);
  }
  return logits ? sse_range<float, true>(recon_type, recon, target_type, target, begin, end)
                : sse_range<float, false>(recon_type, recon, target_type, target, begin, end);
}

template <class A, bool logits>
void sse_grad_range(DType recon_type, const void* recon, DType target_type, const void* target, A coefficient,
                    void* grad, int64_t begin, int64_t end) {
  alignas(64) A grad_buffer[kBlock];
  by_blocks<A>(recon_type, recon, target_type, target, begin, end,
               [&]<class T>(const A* __restrict r, const T* __restrict t, int64_t b, int n) {
                 A* __restrict g = place<A>(recon_type, grad, b, grad_buffer);
                 for (int i = 0; i < n; ++i) g[i] = coefficient * half_slope<logits>(r[i], fraction<A>(t[i]));
                 store(recon_type, grad, b, n, g);
               });
}

void sse_grad(DType recon_type, const void* recon, DType target_type, const void* target, bool logits,
              double coefficient, void* grad, int64_t begin, int64_t end) {
  const float single = static_cast<float>(coefficient);
  if (recon_type == DType::f64) {
    logits ? sse_grad_range<double, true>(recon_type, recon, target_type, target, coefficient, grad, begin, end)
           : sse_grad_range<double, false>(recon_type, recon, target_type, target, coefficient, grad, begin, end);
  } else {
    logits ? sse_grad_range<float, true>(recon_type, recon, target_type, target, single, grad, begin, end)
           : sse_grad_range<float, false>(recon_type, recon, target_type, target, single, grad, begin, end);
  }
}

// ---- noise ---------------------------------------------------------------------------------------------------------

struct Tile {
  alignas(64) uint32_t w[4][kTile / 4];
  alignas(64) float n[4][kTile / 4];
};

void tile_words(RngState rng, int64_t sample, int64_t first_quad, int quads, Tile* tile) {
  for (int i = 0; i < quads; ++i) {
    const Words words = philox_quad(rng, sample, first_quad + i);
    for (int j = 0; j < 4; ++j) tile->w[j][i] = words.w[j];
  }
}

// The normals of latents [first, first + n) of one sample; first is a multiple of 4.
void tile_normals(RngState rng, int64_t sample, int64_t first, int n, Tile* tile, float* eps) {
  const int quads = (n + 3) / 4;
  tile_words(rng, sample, first / 4, quads, tile);
  for (int pair = 0; pair < 4; pair += 2) {
    for (int i = 0; i < quads; ++i) {
      box_muller(tile->w[pair][i], tile->w[pair + 1][i], &tile->n[pair][i], &tile->n[pair + 1][i]);
    }
  }
  for (int i = 0; i < quads; ++i) {
    for (int j = 0; j < 4; ++j) eps[4 * i + j] = tile->n[j][i];
  }
}

void noise(int64_t* words, float* normals, int64_t k, RngState rng, int64_t first_sample, int64_t begin, int64_t end) {
  Tile tile;
  alignas(64) float eps[kTile];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < k; first += kTile) {
      const int n = static_cast<int>(k - first < kTile ? k - first : kTile);
      if (words != nullptr) {
        tile_words(rng, first_sample + row, first / 4, (n + 3) / 4, &tile);
        for (int i = 0; i < n; ++i) words[row * k + first + i] = tile.w[i % 4][i / 4];
      } else {
        tile_normals(rng, first_sample + row, first, n, &tile, eps);
        std::memcpy(normals + row * k + first, eps, sizeof(float) * n);
      }
    }
  }
}

// ---- sampling and KL -----------------------------------------------------------------------------------------------

template <class A>
void sample_range(DType type, Rows mu, Rows log_sigma, void* z, double* sums, int64_t k, RngState rng,
                  int64_t first_sample, int64_t begin, int64_t end) {
  Tile tile;
  alignas(64) float eps[kTile];
  alignas(64) A mu_buffer[kTile], log_sigma_buffer[kTile], z_buffer[kTile], sigma2[kTile], rest[kTile];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < k; first += kTile) {
      const int n = static_cast<int>(k - first < kTile ? k - first : kTile);
      tile_normals(rng, first_sample + row, first, n, &tile, eps);
      const A* __restrict m = load<A>(type, mu.data, row * mu.stride + first, n, mu_buffer);
      const A* __restrict l = load<A>(type, log_sigma.data, row * log_sigma.stride + first, n, log_sigma_buffer);
      A* __restrict out = place<A>(type, z, row * k + first, z_buffer);
      for (int i = 0; i < n; ++i) {
        const Latent<A> latent = sample_latent<A>(m[i], l[i], static_cast<A>(eps[i]));
        out[i] = latent.z;
        sigma2[i] = latent.sigma * latent.sigma;
        rest[i] = latent.rest;
      }
      store(type, z, row * k + first, n, out);
      double* __restrict sum = sums + first;
      for (int i = 0; i < n; ++i) {
        const double value = m[i];
        const double square = value * value;
        sum[i] += value;
        sum[i + k] += square;
        sum[i + 2 * k] += sigma2[i];
        sum[i + 3 * k] += 0.5 * square + rest[i];
      }
    }
  }
}

void sample(DType type, Rows mu, Rows log_sigma, void* z, double* sums, int64_t k, RngState rng, int64_t first_sample,
            int64_t begin, int64_t end) {
  if (type == DType::f64) {
    sample_range<double>(type, mu, log_sigma, z, sums, k, rng, first_sample, begin, end);
  } else {
    sample_range<float>(type, mu, log_sigma, z, sums, k, rng, first_sample, begin, end);
  }
}

template <class A>
void sample_grad_range(DType type, const void* grad_z, const void* grad_kl, bool per_latent, Rows mu, Rows log_sigma,
                       void* grad_mu, void* grad_log_sigma, int64_t k, RngState rng, int64_t first_sample,
                       int64_t begin, int64_t end) {
  const A* const g_kl = static_cast<const A*>(grad_kl);
  const A g_all = g_kl != nullptr && !per_latent ? *g_kl : A(0);
  Tile tile;
  alignas(64) float eps[kTile];
  alignas(64) A mu_buffer[kTile], log_sigma_buffer[kTile], g_buffer[kTile], g_mu_buffer[kTile], g_ls_buffer[kTile];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < k; first += kTile) {
      const int n = static_cast<int>(k - first < kTile ? k - first : kTile);
      const int64_t at = row * k + first;
      tile_normals(rng, first_sample + row, first, n, &tile, eps);
      const A* __restrict m = load<A>(type, mu.data, row * mu.stride + first, n, mu_buffer);
      const A* __restrict l = load<A>(type, log_sigma.data, row * log_sigma.stride + first, n, log_sigma_buffer);
      const A* __restrict g = g_buffer;
      if (grad_z != nullptr) {
        g = load<A>(type, grad_z, at, n, g_buffer);
      } else {
        for (int i = 0; i < n; ++i) g_buffer[i] = A(0);
      }
      A* __restrict g_mu = place<A>(type, grad_mu, at, g_mu_buffer);
      A* __restrict g_ls = place<A>(type, grad_log_sigma, at, g_ls_buffer);
      if (per_latent) {
        const A* __restrict g_each = g_kl + first;
        for (int i = 0; i < n; ++i) {
          latent_gradient<A>(m[i], l[i], static_cast<A>(eps[i]), g[i], g_each[i], &g_mu[i], &g_ls[i]);
        }
      } else {
        for (int i = 0; i < n; ++i) {
          latent_gradient<A>(m[i], l[i], static_cast<A>(eps[i]), g[i], g_all, &g_mu[i], &g_ls[i]);
        }
      }
      store(type, grad_mu, at, n, g_mu);
      store(type, grad_log_sigma, at, n, g_ls);
    }
  }
}

void sample_grad(DType type, const void* grad_z, const void* grad_kl, bool per_latent, Rows mu, Rows log_sigma,
                 void* grad_mu, void* grad_log_sigma, int64_t k, RngState rng, int64_t first_sample, int64_t begin,
                 int64_t end) {
  const auto range = type == DType::f64 ? sample_grad_range<double> : sample_grad_range<float>;
  range(type, grad_z, grad_kl, per_latent, mu, log_sigma, grad_mu, grad_log_sigma, k, rng, first_sample, begin, end);
}

// ---- gather --------------------------------------------------------------------------------------------------------

template <class T, class Convert>
void unit_values(const uint8_t* __restrict rows, void* x, int64_t n, Convert convert) {
  T* __restrict out = static_cast<T*>(x);
  for (int64_t i = 0; i < n; ++i) out[i] = convert(unit_from_u8(static_cast<float>(rows[i])));
}

// One line of pixels in reverse. The number of channels, where it is fixed, is known to the compiler: 0 stands for any.
template <int fixed>
void mirror(const uint8_t* __restrict from, uint8_t* __restrict to, int64_t width, int64_t any) {
  const int64_t channels = fixed != 0 ? fixed : any;
  for (int64_t w = 0; w < width; ++w) {
    for (int64_t c = 0; c < channels; ++c) to[w * channels + c] = from[(width - 1 - w) * channels + c];
  }
}

void gather(const uint8_t* data, const int64_t* index, const bool* flip, DType type, void* x, uint8_t* rows,
            int64_t height, int64_t width, int64_t channels, int64_t begin, int64_t end) {
  const int64_t line = width * channels;
  const int64_t image = height * line;
  const auto mirror_line = channels == 3 ? mirror<3> : channels == 1 ? mirror<1> : mirror<0>;
  for (int64_t b = begin; b < end; ++b) {
    const uint8_t* from = data + index[b] * image;
    uint8_t* to = rows + b * image;
    if (flip == nullptr || !flip[b]) {
      std::memcpy(to, from, static_cast<size_t>(image));
    } else {
      for (int64_t h = 0; h < height; ++h) mirror_line(from + h * line, to + h * line, width, channels);
    }
    switch (type) {
      case DType::bf16:
        unit_values<uint16_t>(to, static_cast<uint16_t*>(x) + b * image, image,
                              [](float v) { return bf16_from_float(v); });
        break;
      case DType::f16:
        unit_values<uint16_t>(to, static_cast<uint16_t*>(x) + b * image, image,
                              [](float v) { return f16_from_float(v); });
        break;
      case DType::f64: {
        double* out = static_cast<double*>(x) + b * image;
        for (int64_t i = 0; i < image; ++i) out[i] = fraction<double>(to[i]);
        break;
      }
      default:
        unit_values<float>(to, static_cast<float*>(x) + b * image, image, [](float v) { return v; });
    }
  }
}

// ---- batch norm with ReLU ------------------------------------------------------------------------------------------

constexpr int kWide = 256;  // channels at a time
constexpr int kRows = 64;   // rows whose sums stay in float

void widen(DType type, const void* x, float* out, int64_t n) {
  float buffer[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int part = static_cast<int>(n - i < kBlock ? n - i : kBlock);
    std::memcpy(out + i, load<float>(type, x, i, part, buffer), sizeof(float) * part);
  }
}

// One number a channel, repeated up to kWide where there are few channels: several rows then pass as one long one.
struct PerChannel {
  alignas(64) float repeated[kWide];
  const float* values;
  PerChannel(const float* given, int64_t channels) : values(given) {
    if (channels > kWide) return;
    for (int i = 0; i < kWide; ++i) repeated[i] = given[i % channels];
    values = repeated;
  }
};

// Calls f(offset of the first element, first channel, number of elements) over [begin, end) rows, and after every few
// calls flush(first channel, number of elements): what f adds up in float by place in its block is then to be moved.
template <class F, class G>
void by_channels(int64_t channels, int64_t begin, int64_t end, F f, G flush) {
  if (channels <= kWide) {
    const int64_t together = kWide / channels;
    const int whole = static_cast<int>(together * channels);
    for (int64_t r = begin; r < end; r += kRows * together) {
      const int64_t last = end - r < kRows * together ? end : r + kRows * together;
      for (int64_t row = r; row < last; row += together) {
        f(row * channels, 0, last - row < together ? static_cast<int>((last - row) * channels) : whole);
      }
      flush(0, whole);
    }
    return;
  }
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t last = end - r < kRows ? end : r + kRows;
    for (int64_t c = 0; c < channels; c += kWide) {
      const int n = static_cast<int>(channels - c < kWide ? channels - c : kWide);
      for (int64_t row = r; row < last; ++row) f(row * channels + c, c, n);
      flush(c, n);
    }
  }
}

// Two sums a channel, in float for a while.
struct Pair {
  alignas(64) float first[kWide] = {}, second[kWide] = {};
  void move_to(double* sums, int64_t channels, int64_t c, int n) {
    for (int i = 0; i < n; ++i) {
      sums[(c + i) % channels] += first[i];
      sums[channels + (c + i) % channels] += second[i];
      first[i] = second[i] = 0.0f;
    }
  }
};

void moments(DType type, const void* x, const float* origin, double* sums, int64_t channels, int64_t begin,
             int64_t end) {
  alignas(64) float buffer[kWide];
  const PerChannel origins(origin, channels);
  Pair pair;
  by_channels(
      channels, begin, end,
      [&](int64_t at, int64_t c, int n) {
        const float* __restrict v = load<float>(type, x, at, n, buffer);
        const float* __restrict o = origins.values + c;
        float* __restrict first = pair.first;
        float* __restrict second = pair.second;
        for (int i = 0; i < n; ++i) {
          const float d = v[i] - o[i];
          first[i] += d;
          second[i] += d * d;
        }
      },
      [&](int64_t c, int n) { pair.move_to(sums, channels, c, n); });
}

void scale_relu(DType type, const void* x, const float* mean, const float* scale, const float* bias, void* y,
                int64_t channels, int64_t begin, int64_t end) {
  alignas(64) float buffer[kWide], results[kWide];
  const PerChannel means(mean, channels), scales(scale, channels), biases(bias, channels);
  by_channels(
      channels, begin, end,
      [&](int64_t at, int64_t c, int n) {
        const float* __restrict v = load<float>(type, x, at, n, buffer);
        const float* __restrict m = means.values + c;
        const float* __restrict s = scales.values + c;
        const float* __restrict b = biases.values + c;
        float* __restrict out = place<float>(type, y, at, results);
        for (int i = 0; i < n; ++i) {
          out[i] = relu(normalised(v[i] - m[i], s[i], b[i]));
        }
        store(type, y, at, n, out);
      },
      [](int64_t, int) {});
}

void gradient_moments(DType type, const void* grad, const void* x, const float* mean, const float* scale,
                      const float* bias, double* sums, int64_t channels, int64_t begin, int64_t end) {
  alignas(64) float buffer[kWide], grads[kWide];
  const PerChannel means(mean, channels), scales(scale, channels), biases(bias, channels);
  Pair pair;
  by_channels(
      channels, begin, end,
      [&](int64_t at, int64_t c, int n) {
        const float* __restrict v = load<float>(type, x, at, n, buffer);
        const float* __restrict g = load<float>(type, grad, at, n, grads);
        const float* __restrict m = means.values + c;
        const float* __restrict s = scales.values + c;
        const float* __restrict b = biases.values + c;
        float* __restrict first = pair.first;
        float* __restrict second = pair.second;
        for (int i = 0; i < n; ++i) {
          const float d = v[i] - m[i];
          const float passed = passed_by_relu(g[i], d, s[i], b[i]);
          first[i] += passed;
          second[i] += passed * d;
        }
      },
      [&](int64_t c, int n) { pair.move_to(sums, channels, c, n); });
}

void scale_relu_grad(DType type, const void* grad, const void* x, const float* mean, const float* scale,
                     const float* bias, const float* slope, const float* constant, const void* more, void* grad_x,
                     int64_t channels, int64_t begin, int64_t end) {
  alignas(64) float buffer[kWide], grads[kWide], results[kWide], added[kWide];
  const PerChannel means(mean, channels), scales(scale, channels), biases(bias, channels), slopes(slope, channels),
      constants(constant, channels);
  by_channels(
      channels, begin, end,
      [&](int64_t at, int64_t c, int n) {
        const float* __restrict v = load<float>(type, x, at, n, buffer);
        const float* __restrict g = load<float>(type, grad, at, n, grads);
        const float* __restrict m = means.values + c;
        const float* __restrict s = scales.values + c;
        const float* __restrict b = biases.values + c;
        const float* __restrict k = slopes.values + c;
        const float* __restrict o = constants.values + c;
        float* __restrict out = place<float>(type, grad_x, at, results);
        for (int i = 0; i < n; ++i) {
          const float d = v[i] - m[i];
          out[i] = norm_gradient_of_x(passed_by_relu(g[i], d, s[i], b[i]), d, s[i], k[i], o[i]);
        }
        if (more != nullptr) {
          const float* __restrict a = load<float>(type, more, at, n, added);
          for (int i = 0; i < n; ++i) out[i] += a[i];
        }
        store(type, grad_x, at, n, out);
      },
      [](int64_t, int) {});
}

void add_biased(DType type, const void* a, const void* b, const float* bias, void* out, int64_t channels,
                int64_t begin, int64_t end) {
  alignas(64) float first[kWide], second[kWide], results[kWide];
  const PerChannel biases(bias, channels);
  by_channels(
      channels, begin, end,
      [&](int64_t at, int64_t c, int n) {
        const float* __restrict v = load<float>(type, a, at, n, first);
        const float* __restrict o = biases.values + c;
        float* __restrict to = place<float>(type, out, at, results);
        if (b != nullptr) {
          const float* __restrict w = load<float>(type, b, at, n, second);
          for (int i = 0; i < n; ++i) to[i] = v[i] + w[i] + o[i];
        } else {
          for (int i = 0; i < n; ++i) to[i] = v[i] + o[i];
        }
        store(type, out, at, n, to);
      },
      [](int64_t, int) {});
}

void relu_grad(DType type, const void* grad, const void* y, void* out, int64_t begin, int64_t end) {
  alignas(64) float grads[kBlock], values[kBlock], results[kBlock];
  for (int64_t b = begin; b < end; b += kBlock) {
    const int n = static_cast<int>(end - b < kBlock ? end - b : kBlock);
    const float* __restrict g = load<float>(type, grad, b, n, grads);
    const float* __restrict v = load<float>(type, y, b, n, values);
    float* __restrict to = place<float>(type, out, b, results);
    for (int i = 0; i < n; ++i) to[i] = relu_gradient(g[i], v[i]);
    store(type, out, b, n, to);
  }
}

// ---- Adam ----------------------------------------------------------------------------------------------------------

int32_t largest_magnitude(DType type, const void* data, int64_t begin, int64_t end) {
  alignas(64) float buffer[kBlock];
  int32_t largest = 0;
  for (int64_t b = begin; b < end; b += kBlock) {
    const int n = static_cast<int>(end - b < kBlock ? end - b : kBlock);
    const float* __restrict v = load<float>(type, data, b, n, buffer);
    for (int i = 0; i < n; ++i) {
      const int32_t next = magnitude(v[i]);
      largest = next > largest ? next : largest;
    }
  }
  return largest;
}

void adam(AdamFactors factors, AdamCorrections corrections, DType type, const void* grad, float* parameter,
          float* exp_avg, float* exp_avg_sq, uint16_t* half, int64_t begin, int64_t end) {
  alignas(64) float buffer[kBlock];
  for (int64_t b = begin; b < end; b += kBlock) {
    const int n = static_cast<int>(end - b < kBlock ? end - b : kBlock);
    const float* __restrict g = load<float>(type, grad, b, n, buffer);
    float* __restrict p = parameter + b;
    float* __restrict m = exp_avg + b;
    float* __restrict v = exp_avg_sq + b;
    for (int i = 0; i < n; ++i) adam_element(factors, corrections, g[i], &p[i], &m[i], &v[i]);
    if (half != nullptr) {
      uint16_t* __restrict h = half + b;
      for (int i = 0; i < n; ++i) h[i] = bf16_from_float(p[i]);
    }
  }
}

}  // namespace
}  // namespace bvae

#define BVAE_CPU_LOOPS(table) \
  extern const ::bvae::CpuLoops table = {BVAE_CPU_NAME, sse, sse_grad, sample, sample_grad, noise, gather, \
                                           widen, moments, scale_relu, gradient_moments, scale_relu_grad, add_biased, \
                                           relu_grad, largest_magnitude, adam}

// The embedded image network for CPUs with AMX: convolutions as tiles of bfloat16 products summed in float32.
//
// Activations are float32, channels last, in rows two positions longer than the picture, so that a tap of a 3x3
// convolution is a constant offset into a bordered bfloat16 copy. A convolution with `split` reads activations and
// weights as hi + lo and multiplies hi*hi + lo*hi + hi*lo: float32 to about 3e-6. Without it products are bfloat16's.
// Weights are packed by fashion_amx.py; layers follow diffusers' UNet2DModel of the embedded model, and nothing else.

#include <immintrin.h>
#include <sys/syscall.h>
#include <torch/extension.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr int kGroup = 4;  // pictures that pass the inner layers together: weights stay in the cache
constexpr int kTile = 16;  // positions and channels of a tile

void *aligned(size_t bytes) {
  void *p = nullptr;
  TORCH_CHECK(posix_memalign(&p, 64, bytes + 65536) == 0);  // tiles read and write past the end
  memset(p, 0, bytes + 65536);
  return p;
}

struct Pictures {  // one float32 map per picture of the group
  float *of[kGroup];
};
struct Bordered {  // the same in bfloat16, with a border of zeros
  uint16_t *of[kGroup];
};
struct Input {
  const Pictures *from;
  int channels;
};
struct Part {
  const float *at;
  int channels;
};

struct Convolution {
  int out, taps, pixel;  // output channels, 1 or 9, bfloat16 numbers per position
  bool split;
  std::vector<int> depths;  // offsets of the tiles within a position
  uint16_t *weights;
  float *bias;
};
struct Norm {
  std::vector<float> weight, bias;
};
struct Resnet {
  Norm first, second;
  int conv1, conv2, shortcut, shift;  // shortcut: -1 for none; shift: where its numbers begin
};

std::vector<Convolution> convolutions;
std::vector<Resnet> resnets;
enum Other { kDown0, kDown1, kQkv, kOut, kUp0, kUp1 };
std::vector<int> others;
float *conv_in_weight, *conv_in_bias, *conv_out_weight, conv_out_bias;
Norm last_norm;

int begin = 0, end = 1;  // pictures of the group that a layer works on

// ---- tiles

struct __attribute__((packed)) TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

void configure_tiles() {
  syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18);
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}

struct Place {  // where a block reads and writes; steps are between tiles, rows between positions
  const uint16_t *in;
  long in_step, in_row;
  const uint16_t *weights;
  long weights_step;
  float *out;
  long out_step;
  int out_row;
  const float *start;  // what the sums start from: the bias, or what is there
  long start_step;
  int start_row;
};

// M x N tiles of the output, four in all. Tile registers are named by constants: 0 to 3 are the sums.
template <int M, int N>
void block(const Place &p, const int *offsets, int count) {
  static_assert((M == 2 && N == 2) || (M == 4 && N == 1));
  const long from = 4L * p.start_row, to = 4L * p.out_row, row = 2 * p.in_row;
#define START(sum) _tile_loadd(sum, p.start + (sum) / N * p.start_step + (sum) % N * kTile, from)
#define STORE(sum) _tile_stored(sum, p.out + (sum) / N * p.out_step + (sum) % N * kTile, to)
  START(0);
  START(1);
  START(2);
  START(3);
  for (int k = 0; k < count; ++k) {
    const uint16_t *a = p.in + offsets[k], *b = p.weights + k * 512L;
    _tile_loadd(4, a, row);
    _tile_loadd(6, b, 64);
    if constexpr (N == 2) _tile_loadd(7, b + p.weights_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + p.in_step, row);
    if constexpr (N == 2) {
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, a + 2 * p.in_step, row);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, a + 3 * p.in_step, row);
      _tile_dpbf16ps(3, 5, 6);
    }
  }
  STORE(0);
  STORE(1);
  STORE(2);
  STORE(3);
#undef START
#undef STORE
}

// `size`: height and width of the input. `add`: on top of what `out` holds, without the bias.
void convolve(const Convolution &c, const Bordered &in, int size, const Pictures &out, int stride, bool add) {
  const int row = size + 2;
  int offsets[512], count = 0;
  for (int tap = 0; tap < c.taps; ++tap)
    for (int depth : c.depths) offsets[count++] = (c.taps == 9 ? tap / 3 * row + tap % 3 : row + 1) * c.pixel + depth;
  const int out_size = (size + stride - 1) / stride;
  // With stride 1 positions are one line through all rows; with stride 2 a tile is one row of the output.
  const long tiles = stride == 1 ? (size * row + kTile - 1) / kTile : out_size;
  const long in_step = stride == 1 ? (long)kTile * c.pixel : 2L * row * c.pixel;
  const long out_step = stride == 1 ? (long)kTile * c.out : (long)(out_size + 2) * c.out;
  for (int n = 0; n < c.out / kTile;) {
    const int wide = c.out / kTile - n >= 2 ? 2 : 1, high = wide == 2 ? 2 : 4;
    for (int g = begin; g < end; ++g)
      for (long m = 0; m < tiles; m += high) {
        float *to = out.of[g] + m * out_step + n * kTile;
        const Place place{in.of[g] + m * in_step,
                          in_step,
                          (long)stride * c.pixel,
                          c.weights + n * count * 512L,
                          count * 512L,
                          to,
                          out_step,
                          c.out,
                          add ? to : c.bias + n * kTile,
                          add ? out_step : 0,
                          add ? c.out : 0};
        if (wide == 2)
          block<2, 2>(place, offsets, count);
        else
          block<4, 1>(place, offsets, count);
      }
    n += wide;
  }
}

// ---- between the convolutions, sixteen channels at a time

__m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.f)), _mm512_set1_ps(-87.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  // ln 2 in two parts, then a polynomial for what is left.
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 p = _mm512_set1_ps(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

__m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Sixteen numbers as bfloat16; with split the rest goes to `lo` numbers further.
void put(uint16_t *to, __m512 value, int lo, bool split) {
  const __m256i hi = (__m256i)_mm512_cvtneps_pbh(value);
  _mm256_storeu_si256((__m256i *)to, hi);
  if (!split) return;
  const __m512 kept = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(hi), 16));
  _mm256_storeu_si256((__m256i *)(to + lo), (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(value, kept)));
}

int total(const std::vector<Part> &parts) {
  int channels = 0;
  for (const Part &part : parts) channels += part.channels;
  return channels;
}

// Group normalisation, and scale and shift by the embedding, as a * x + b for each channel.
void normalisation(const std::vector<Part> &parts, int size, const Norm &norm, const float *shift, float *a, float *b) {
  static float sums[512], squares[512];
  int channels = 0;
  for (const Part &part : parts) {
    for (int c = 0; c < part.channels; c += 16) {
      __m512 sum = _mm512_setzero_ps(), square = sum;
      for (int y = 0; y < size; ++y)
        for (int x = 0; x < size; ++x) {
          const __m512 v = _mm512_loadu_ps(part.at + ((long)y * (size + 2) + x) * part.channels + c);
          sum = _mm512_add_ps(sum, v);
          square = _mm512_fmadd_ps(v, v, square);
        }
      _mm512_storeu_ps(sums + channels + c, sum);
      _mm512_storeu_ps(squares + channels + c, square);
    }
    channels += part.channels;
  }
  const int each = channels / 8;
  const double count = (double)each * size * size;
  for (int first = 0; first < channels; first += each) {
    double sum = 0, square = 0;
    for (int c = first; c < first + each; ++c) sum += sums[c], square += squares[c];
    const double mean = sum / count, scale = 1 / std::sqrt(square / count - mean * mean + 1e-5);
    for (int c = first; c < first + each; ++c) {
      const double slope = norm.weight[c] * scale, offset = norm.bias[c] - mean * slope;
      a[c] = shift ? slope * (1 + shift[c]) : slope;
      b[c] = shift ? offset * (1 + shift[c]) + shift[channels + c] : offset;
    }
  }
}

// The bordered copy that a convolution reads: as it is, or after normalisation and SiLU.
void prepare(const Convolution &c, const std::vector<Part> &parts, int size, uint16_t *to, const Norm *norm = nullptr,
             const float *shift = nullptr) {
  static float a[512], b[512];
  if (norm) normalisation(parts, size, *norm, shift, a, b);
  const int row = size + 2, channels = total(parts);
  int before = 0;
  for (const Part &part : parts) {
    for (int k = 0; k < part.channels; k += 16) {
      const __m512 slope = _mm512_loadu_ps(a + before + k), offset = _mm512_loadu_ps(b + before + k);
      for (int y = 0; y < size; ++y)
        for (int x = 0; x < size; ++x) {
          __m512 v = _mm512_loadu_ps(part.at + ((long)y * row + x) * part.channels + k);
          if (norm) v = silu(_mm512_fmadd_ps(v, slope, offset));
          put(to + ((y + 1L) * row + x + 1) * c.pixel + before + k, v, channels, c.split);
        }
    }
    before += part.channels;
  }
}

// The same, at twice the size: every position four times.
void prepare_doubled(const Convolution &c, Part from, int size, uint16_t *to) {
  const int wide = 2 * size + 2;
  for (int y = 0; y < size; ++y)
    for (int x = 0; x < size; ++x)
      for (int k = 0; k < from.channels; k += 16) {
        const __m512 v = _mm512_loadu_ps(from.at + ((long)y * (size + 2) + x) * from.channels + k);
        for (int i = 0; i < 4; ++i)
          put(to + ((2L * y + 1 + i / 2) * wide + 2 * x + 1 + i % 2) * c.pixel + k, v, from.channels, c.split);
      }
}

// ---- buffers. At full size pictures pass one by one and share one; borders stay zero.

const Bordered &bordered(int size, int pixel) {
  static std::map<std::pair<int, int>, Bordered> all;
  auto [found, fresh] = all.try_emplace({size, pixel});
  if (fresh)
    for (int g = 0; g < kGroup; ++g) {
      auto &one = found->second.of[g];
      one = size == 28 && g ? found->second.of[0] : (uint16_t *)aligned(2L * (size + 6) * (size + 2) * pixel);
    }
  return found->second;
}

const Pictures &map(const char *name, int size, int channels, bool shared = false) {
  static std::map<std::string, Pictures> all;
  auto [found, fresh] = all.try_emplace(name);
  if (fresh)
    for (int g = 0; g < kGroup; ++g) {
      auto &one = found->second.of[g];
      one = shared && g ? found->second.of[0] : (float *)aligned(4L * (size + 6) * (size + 2) * channels);
    }
  return found->second;
}

// ---- layers

std::vector<Part> parts_of(const std::vector<Input> &inputs, int g) {
  std::vector<Part> parts;
  for (const Input &input : inputs) parts.push_back({input.from->of[g], input.channels});
  return parts;
}

void copy_with_bias(const float *from, float *to, const Convolution &c, int size) {
  for (long i = 0; i < (long)size * (size + 2); ++i)
    for (int k = 0; k < c.out; k += 16)
      _mm512_storeu_ps(to + i * c.out + k,
                       _mm512_add_ps(_mm512_loadu_ps(from + i * c.out + k), _mm512_loadu_ps(c.bias + k)));
}

void resnet(int index, const std::vector<Input> &inputs, int size, const float *const *shifts, const Pictures &out) {
  const Resnet &r = resnets[index];
  const Convolution &c1 = convolutions[r.conv1], &c2 = convolutions[r.conv2];
  const Pictures &inner = map(size == 28 ? "inner 28" : size == 14 ? "inner 14" : "inner 7", size, 96, size == 28);
  const Bordered &in1 = bordered(size, c1.pixel);
  for (int g = begin; g < end; ++g) prepare(c1, parts_of(inputs, g), size, in1.of[g], &r.first);
  convolve(c1, in1, size, inner, 1, false);
  if (r.shortcut >= 0) {  // its bias holds that of the second convolution too
    const Convolution &c = convolutions[r.shortcut];
    const Bordered &in = bordered(size, c.pixel);
    for (int g = begin; g < end; ++g) prepare(c, parts_of(inputs, g), size, in.of[g]);
    convolve(c, in, size, out, 1, false);
  } else {
    for (int g = begin; g < end; ++g) copy_with_bias(inputs[0].from->of[g], out.of[g], c2, size);
  }
  const Bordered &in2 = bordered(size, c2.pixel);
  for (int g = begin; g < end; ++g)
    prepare(c2, {{inner.of[g], c1.out}}, size, in2.of[g], &r.second, shifts[g] + r.shift);
  convolve(c2, in2, size, out, 1, true);
}

void resample(Other which, const Pictures &from, int channels, int size, const Pictures &to) {
  const Convolution &c = convolutions[others[which]];
  const bool up = which == kUp0 || which == kUp1;
  const Bordered &in = bordered(up ? 2 * size : size, c.pixel);
  for (int g = begin; g < end; ++g) {
    if (up)
      prepare_doubled(c, {from.of[g], channels}, size, in.of[g]);
    else
      prepare(c, {{from.of[g], channels}}, size, in.of[g]);
  }
  convolve(c, in, up ? 2 * size : size, to, up ? 1 : 2, false);
}

// Three heads of 32 channels over 7 x 7 positions, added to `x`.
void attention(const Pictures &x) {
  constexpr int size = 7, row = 9, channels = 96, heads = 3, width = 32, positions = size * size;
  const Convolution &qkv = convolutions[others[kQkv]], &out = convolutions[others[kOut]];
  const Bordered &in = bordered(size, qkv.pixel);
  for (int g = begin; g < end; ++g) prepare(qkv, {{x.of[g], channels}}, size, in.of[g]);
  const Pictures &projected = map("qkv", size, 3 * channels);
  convolve(qkv, in, size, projected, 1, false);
  const Bordered &back = bordered(size, out.pixel);
  static float keys[heads][width][64], answer[(size * row) * channels];
  alignas(64) float weights[64];
  for (int g = begin; g < end; ++g) {
    const float *all = projected.of[g];
    auto at = [&](int i) { return (long)(i / size) * row + i % size; };
    for (int i = 0; i < positions; ++i)
      for (int c = 0; c < channels; ++c) keys[c / width][c % width][i] = all[at(i) * 288 + channels + c];
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < positions; ++i) {
        const float *query = all + at(i) * 288 + h * width;
        __m512 score[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int d = 0; d < width; ++d)
          for (int j = 0; j < 4; ++j)
            score[j] = _mm512_fmadd_ps(_mm512_set1_ps(query[d]), _mm512_loadu_ps(&keys[h][d][16 * j]), score[j]);
        score[3] = _mm512_mask_blend_ps(1, _mm512_set1_ps(-1e30f), score[3]);  // position 48 is the last
        const __m512 high = _mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3]));
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(high));
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < 4; ++j) {
          __m512 w = exponential(_mm512_mul_ps(_mm512_sub_ps(score[j], top), _mm512_set1_ps(0.17677669529f)));
          if (j == 3) w = _mm512_maskz_mov_ps(1, w);
          _mm512_store_ps(weights + 16 * j, w);
          sum = _mm512_add_ps(sum, w);
        }
        __m512 low = _mm512_setzero_ps(), rest = low;
        for (int j = 0; j < positions; ++j) {
          const float *value = all + at(j) * 288 + 2 * channels + h * width;
          low = _mm512_fmadd_ps(_mm512_set1_ps(weights[j]), _mm512_loadu_ps(value), low);
          rest = _mm512_fmadd_ps(_mm512_set1_ps(weights[j]), _mm512_loadu_ps(value + 16), rest);
        }
        const __m512 scale = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
        float *to = answer + at(i) * channels + h * width;
        _mm512_storeu_ps(to, _mm512_mul_ps(low, scale));
        _mm512_storeu_ps(to + 16, _mm512_mul_ps(rest, scale));
      }
    prepare(out, {{answer, channels}}, size, back.of[g]);
    copy_with_bias(x.of[g], x.of[g], out, size);
  }
  convolve(out, back, size, x, 1, true);
}

void conv_in(const float *picture, float *to) {
  static float *framed = (float *)aligned(4 * 30 * 30);
  for (int y = 0; y < 28; ++y) memcpy(framed + (y + 1) * 30 + 1, picture + y * 28, 28 * 4);
  for (int y = 0; y < 28; ++y)
    for (int x = 0; x < 28; ++x) {
      __m512 sum = _mm512_loadu_ps(conv_in_bias);
      for (int tap = 0; tap < 9; ++tap)
        sum = _mm512_fmadd_ps(_mm512_set1_ps(framed[(y + tap / 3) * 30 + x + tap % 3]),
                              _mm512_loadu_ps(conv_in_weight + 16 * tap), sum);
      _mm512_storeu_ps(to + (y * 30L + x) * 16, sum);
    }
}

void conv_out(const float *from, float *picture) {
  static float a[16], b[16], *framed = (float *)aligned(4 * 30 * 30 * 16);
  normalisation({{from, 16}}, 28, last_norm, nullptr, a, b);
  const __m512 slope = _mm512_loadu_ps(a), offset = _mm512_loadu_ps(b);
  for (int y = 0; y < 28; ++y)
    for (int x = 0; x < 28; ++x)
      _mm512_storeu_ps(framed + ((y + 1) * 30L + x + 1) * 16,
                       silu(_mm512_fmadd_ps(_mm512_loadu_ps(from + (y * 30L + x) * 16), slope, offset)));
  for (int y = 0; y < 28; ++y)
    for (int x = 0; x < 28; ++x) {
      __m512 sum = _mm512_setzero_ps();
      for (int tap = 0; tap < 9; ++tap)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(framed + ((y + tap / 3) * 30L + x + tap % 3) * 16),
                              _mm512_loadu_ps(conv_out_weight + 16 * tap), sum);
      picture[y * 28 + x] = _mm512_reduce_add_ps(sum) + conv_out_bias;
    }
}

void group(int count, const float *const *in, float *const *out, const float *const *shifts) {
  const Pictures &h = map("conv_in", 28, 16), &d0 = map("down 0", 28, 16), &s0 = map("sample 0", 14, 16);
  for (int i = 0; i < count; ++i) {
    begin = i, end = i + 1;
    conv_in(in[i], h.of[i]);
    resnet(0, {{&h, 16}}, 28, shifts, d0);
    resample(kDown0, d0, 16, 28, s0);
  }
  begin = 0, end = count;
  const Pictures &d1 = map("down 1", 14, 48), &s1 = map("sample 1", 7, 48), &d2 = map("down 2", 7, 96);
  resnet(1, {{&s0, 16}}, 14, shifts, d1);
  resample(kDown1, d1, 48, 14, s1);
  resnet(2, {{&s1, 48}}, 7, shifts, d2);
  const Pictures &m0 = map("mid 0", 7, 96), &m1 = map("mid 1", 7, 96);
  resnet(3, {{&d2, 96}}, 7, shifts, m0);
  attention(m0);
  resnet(4, {{&m0, 96}}, 7, shifts, m1);
  const Pictures &u0 = map("up 0", 7, 96), &u1 = map("up 1", 7, 96), &u2 = map("up 2", 14, 96);
  resnet(5, {{&m1, 96}, {&d2, 96}}, 7, shifts, u0);
  resnet(6, {{&u0, 96}, {&s1, 48}}, 7, shifts, u1);
  resample(kUp0, u1, 96, 7, u2);
  const Pictures &u3 = map("up 3", 14, 48), &u4 = map("up 4", 14, 48);
  resnet(7, {{&u2, 96}, {&d1, 48}}, 14, shifts, u3);
  resnet(8, {{&u3, 48}, {&s0, 16}}, 14, shifts, u4);
  const Pictures &u5 = map("up 5", 28, 48, true), &u6 = map("up 6", 28, 16, true), &u7 = map("up 7", 28, 16, true);
  for (int i = 0; i < count; ++i) {
    begin = i, end = i + 1;
    resample(kUp1, u4, 48, 14, u5);
    resnet(9, {{&u5, 48}, {&d0, 16}}, 28, shifts, u6);
    resnet(10, {{&u6, 16}, {&h, 16}}, 28, shifts, u7);
    conv_out(u7.of[i], out[i]);
  }
}

// ---- what Python calls

float *kept(const at::Tensor &values) {
  const auto whole = values.contiguous();
  auto *to = (float *)aligned(4 * whole.numel());
  memcpy(to, whole.data_ptr<float>(), 4 * whole.numel());
  return to;
}

Norm norm_of(const at::Tensor &weight, const at::Tensor &bias) {
  const float *w = weight.data_ptr<float>(), *b = bias.data_ptr<float>();
  return {{w, w + weight.numel()}, {b, b + bias.numel()}};
}

int64_t add_convolution(at::Tensor packed, at::Tensor bias, int64_t out, bool split, int64_t taps, int64_t pixel,
                        std::vector<int64_t> depths) {
  auto *weights = (uint16_t *)aligned(2 * packed.numel());
  memcpy(weights, packed.contiguous().data_ptr(), 2 * packed.numel());
  convolutions.push_back({(int)out, (int)taps, (int)pixel, split, {depths.begin(), depths.end()}, weights, kept(bias)});
  return convolutions.size() - 1;
}

void add_resnet(at::Tensor w1, at::Tensor b1, at::Tensor w2, at::Tensor b2, int64_t conv1, int64_t conv2,
                int64_t shortcut, int64_t shift) {
  resnets.push_back({norm_of(w1, b1), norm_of(w2, b2), (int)conv1, (int)conv2, (int)shortcut, (int)shift});
}

void finish(std::vector<int64_t> convs, at::Tensor in_weight, at::Tensor in_bias, at::Tensor out_weight,
            double out_bias, at::Tensor norm_weight, at::Tensor norm_bias) {
  others.assign(convs.begin(), convs.end());
  conv_in_weight = kept(in_weight), conv_in_bias = kept(in_bias);
  conv_out_weight = kept(out_weight), conv_out_bias = out_bias;
  last_norm = norm_of(norm_weight, norm_bias);
}

// x: (n, 1, 28, 28). shifts: (classes, all scales and shifts). labels: (n,).
at::Tensor run(at::Tensor x, at::Tensor shifts, at::Tensor labels) {
  x = x.contiguous();
  auto out = at::empty_like(x);
  configure_tiles();
  const int64_t count = x.size(0), width = shifts.size(1), *label = labels.data_ptr<int64_t>();
  for (int64_t i = 0; i < count; i += kGroup) {
    const float *in[kGroup], *shift[kGroup];
    float *to[kGroup];
    const int n = std::min<int64_t>(kGroup, count - i);
    for (int j = 0; j < n; ++j) {
      in[j] = x.data_ptr<float>() + (i + j) * 784;
      to[j] = out.data_ptr<float>() + (i + j) * 784;
      shift[j] = shifts.data_ptr<float>() + label[i + j] * width;
    }
    group(n, in, to, shift);
  }
  _tile_release();
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("add_convolution", add_convolution);
  m.def("add_resnet", add_resnet);
  m.def("finish", finish);
  m.def("run", run);
}

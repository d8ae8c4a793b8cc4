// CPU kernels of the reference runtime: everything that a step does between two calls of Python.
//
// Compiled on the machine that runs them (see compiler.py) and called through ctypes: plain C functions over pointers
// that Python has checked. Vectors are GCC's 16-lane float type, which every target lowers to what it has. What is hot
// is written twice: for AVX-512, with its bfloat16 dot product where there is one, and for everybody else in vectors of
// 8 lanes, because GCC 12 keeps those that it has to split in memory. There bfloat16 is widened before it is multiplied.
//
// Sums run in float32 in an order that depends on the row alone, never on what else is in the batch (with AVX-512, MXFP4
// experts in bfloat16 have two orders, one for few rows and one for many).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <omp.h>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum Dtype { FLOAT32, BFLOAT16, E4M3FN, MXFP4 };  // native_kernels.py has the same numbers

namespace {

constexpr int LANES = 16;
constexpr int64_t PARALLEL_WORK = 1 << 20;  // products below which waking threads costs more than it saves
constexpr int MX_BLOCK = 32;  // values that share a scale in MXFP4
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32), may_alias));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
struct BFloat16 { uint16_t bits; };
struct E4M3 { uint8_t bits; };
#if defined(__AVX512F__)
typedef Floats Part;  // what one register holds
typedef Ints PartInts;
constexpr PartInts LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
template <class X> using Operand = X;  // what values of dtype X are multiplied as
#else
typedef Floats8 Part;
typedef Ints8 PartInts;
constexpr PartInts LANE = {0, 1, 2, 3, 4, 5, 6, 7};
template <class X> using Operand = float;
#endif
constexpr int PART = sizeof(Part) / sizeof(float);

template <class V> inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <class V> inline void save(void* to, const V& value) { std::memcpy(to, &value, sizeof(V)); }
template <class To, class From> inline To bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  return load<To>(&value);
}
inline Part& part_of(Floats& v, int64_t part) { return reinterpret_cast<Part*>(&v)[part]; }
inline const Part& part_of(const Floats& v, int64_t part) { return reinterpret_cast<const Part*>(&v)[part]; }
template <class V = Part> inline V fill(float value) { return V{} + value; }
template <class V> inline V smaller(V a, V b) { return a < b ? a : b; }
template <class V> inline V larger(V a, V b) { return a > b ? a : b; }

// Lanes of another width. In one step between bytes and words GCC 12 takes the lanes apart.
#if defined(__AVX512F__)
inline Words widen(Halves16 v) { return Words(_mm512_cvtepu16_epi32(__m256i(v))); }
inline Words widen(Bytes16 v) { return Words(_mm512_cvtepu8_epi32(__m128i(v))); }
inline Halves16 to_halves(Words v) { return Halves16(_mm512_cvtepi32_epi16(__m512i(v))); }
inline Bytes16 to_bytes(Words v) { return Bytes16(_mm512_cvtepi32_epi8(__m512i(v))); }
#else
inline Words widen(Halves16 v) { return __builtin_convertvector(v, Words); }
inline Words widen(Bytes16 v) { return widen(__builtin_convertvector(v, Halves16)); }
inline Halves16 to_halves(Words v) { return __builtin_convertvector(v, Halves16); }
inline Bytes16 to_bytes(Words v) { return __builtin_convertvector(to_halves(v), Bytes16); }
#endif

// -- reading and writing 16 values of any dtype ----------------------------------------------------------------------

inline Floats read16(const float* from) { return load<Floats>(from); }
inline Floats read16(const BFloat16* from) {
  return bits<Floats>(widen(load<Halves16>(from)) << 16);
}
inline Floats read16(const E4M3* from) {
  // Sign and exponent move into place, 2^(127 - 7) makes up for the biases; right for subnormals too.
  const Ints code = bits<Ints>(widen(load<Bytes16>(from)) << 24) >> 4;
  return bits<Floats>(code & int32_t(0x87F00000)) * 0x1p120f;
}
inline void write16(float* to, Floats value) { save(to, value); }
inline Words round_bfloat16(Floats value) {  // in the high half words: to nearest, ties to even; finite values
  const Words word = bits<Words>(value);
  return word + 0x7FFF + ((word >> 16) & 1);
}
inline void write16(BFloat16* to, Floats value) {
  save(to, to_halves(round_bfloat16(value) >> 16));
}
inline void write16(E4M3* to, Floats value) {  // to nearest, ties to even; saturates at +-448
  const Words sign = bits<Words>(value) >> 31 << 7;
  const Floats size = smaller(bits<Floats>(bits<Words>(value) & 0x7FFFFFFF), fill<Floats>(448.0f));
  const Words word = bits<Words>(size), normal = ((word + 0x7FFFF + ((word >> 20) & 1)) >> 20) - (120 << 3);
  const Words subnormal = bits<Words>(size * 512.0f + 12582912.0f) - 0x4B400000;
  save(to, to_bytes(sign | (size < 0x1p-6f ? subnormal : normal)));
}
// As values of dtype T: what write16 and read16 would give.
template <class T> inline Floats rounded(Floats value) {
  if constexpr (std::is_same_v<T, float>) return value;
  else return bits<Floats>(round_bfloat16(value) & 0xFFFF0000u);
}
#if defined(__AVX512F__)
template <class To> inline void write_part(To* to, Part value) { write16(to, value); }
#else
inline void write_part(float* to, Part value) { save(to, value); }
#endif
// Values of dtype T as the products read them.
template <class T> inline void write_operand(Operand<T>* to, Floats value) {
  if constexpr (std::is_same_v<T, Operand<T>>) write16(to, value);
  else write16(to, rounded<T>(value));
}
inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return bits<float>(uint32_t(value.bits) << 16); }
inline float to_float(E4M3 value) {
  return bits<float>((uint32_t(int32_t(int8_t(value.bits))) << 20) & 0x87F00000u) * 0x1p120f;
}
template <class T> inline T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    const uint32_t word = bits<uint32_t>(value);
    return T{uint16_t((word + 0x7FFF + ((word >> 16) & 1)) >> 16)};
  }
}

// e^x for x <= 0 or moderate: Cephes' expf, relative error below 2e-7, 0 far below.
inline Part exponential(Part x) {
  const Part clipped = larger(smaller(x, fill(88.0f)), fill(-87.5f));
  const Part shifted = clipped * 1.44269504f + 12582912.0f;  // the integer part lands in the low mantissa bits
  const Part whole = shifted - 12582912.0f;
  const Part r = clipped - whole * 0.693359375f + whole * 2.12194440e-4f;
  Part p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const PartInts exponent = (bits<PartInts>(shifted) - 0x4B400000) << 23;
  const Part value = bits<Part>(bits<PartInts>(p) + exponent);
  return x < -87.0f ? Part{} : value;
}

inline float sum_lanes(Floats v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}
inline float max_lane(Part v) {
#pragma GCC unroll 4
  for (int distance = PART / 2; distance > 0; distance /= 2) v = larger(v, __builtin_shuffle(v, LANE ^ distance));
  return v[0];
}

// Lane i of the result is the sum of the lanes of v[i].
inline Part sum_each(Part v[PART]) {
#if defined(__AVX512F__)
  constexpr PartInts LOW[] = {{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
                              {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                              {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                              {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}};
#else
  constexpr PartInts LOW[] = {{0, 8, 2, 10, 4, 12, 6, 14}, {0, 1, 8, 9, 4, 5, 12, 13}, {0, 1, 2, 3, 8, 9, 10, 11}};
#endif
#pragma GCC unroll 4
  for (int level = 0; level < int(std::size(LOW)); ++level) {
#pragma GCC unroll 8
    for (int i = 0; i < (PART / 2 >> level); ++i) {
      const Part a = v[2 * i], b = v[2 * i + 1];
      v[i] = __builtin_shuffle(a, b, LOW[level]) + __builtin_shuffle(a, b, LOW[level] + (1 << level));
    }
  }
  return v[0];
}

// -- norm, rotary embedding, cache, router ---------------------------------------------------------------------------

template <> inline E4M3 from_float<E4M3>(float value) {  // to nearest, ties to even; saturates at +-448
  const uint32_t sign = bits<uint32_t>(value) >> 31 << 7;
  const float size = std::min(std::abs(value), 448.0f);
  if (size < 0x1p-6f) return E4M3{uint8_t(sign | uint32_t(std::nearbyint(size * 512.0f)))};
  const uint32_t word = bits<uint32_t>(size);
  return E4M3{uint8_t(sign | (((word + 0x7FFFF + ((word >> 20) & 1)) >> 20) - (120 << 3)))};
}

template <class T> void normalize(const void* x_, const float* weight, float eps, int64_t rows, int64_t width, void* out_) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* x = static_cast<const T*>(x_) + row * width;
    T* out = static_cast<T*>(out_) + row * width;
    Floats squares = {};
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) squares += read16(x + d) * read16(x + d);
    float total = sum_lanes(squares);
    for (; d < width; ++d) total += to_float(x[d]) * to_float(x[d]);
    const float factor = 1.0f / std::sqrt(total / float(width) + eps);
    for (d = 0; d + LANES <= width; d += LANES) write16(out + d, read16(x + d) * factor * load<Floats>(weight + d));
    for (; d < width; ++d) out[d] = from_float<T>(to_float(x[d]) * factor * weight[d]);
  }
}

// A row of qkv holds the heads of q, then of k, then of v; pairs are (i, i + head_dim / 2).
template <class T, class KV>
void rotate_rows(const void* qkv_, const void* cos_, const void* sin_, const int64_t* positions, int64_t rows,
                 int64_t heads, int64_t kv_heads, int64_t dim, void* q_, void* kv_) {
  const int64_t half = dim / 2;
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = static_cast<const T*>(qkv_) + row * (heads + 2 * kv_heads) * dim;
    const T* cos = static_cast<const T*>(cos_) + positions[row] * half;
    const T* sin = static_cast<const T*>(sin_) + positions[row] * half;
    const auto turn = [&](int64_t head, auto* to) {
      using To = std::remove_pointer_t<decltype(to)>;
      int64_t d = 0;
      for (; d + LANES <= half; d += LANES) {
        const Floats a = read16(from + head * dim + d), b = read16(from + head * dim + half + d);
        const Floats c = read16(cos + d), s = read16(sin + d);
        // Rounded as the rest of the model computes before the cache rounds again.
        write16(to + d, rounded<T>(a * c - b * s));
        write16(to + half + d, rounded<T>(b * c + a * s));
      }
      for (; d < half; ++d) {
        const float a = to_float(from[head * dim + d]), b = to_float(from[head * dim + half + d]);
        const float c = to_float(cos[d]), s = to_float(sin[d]);
        to[d] = from_float<To>(to_float(from_float<T>(a * c - b * s)));
        to[half + d] = from_float<To>(to_float(from_float<T>(b * c + a * s)));
      }
    };
    for (int64_t head = 0; head < heads; ++head) turn(head, static_cast<T*>(q_) + (row * heads + head) * dim);
    KV* k = static_cast<KV*>(kv_) + row * kv_heads * dim;
    KV* v = k + rows * kv_heads * dim;
    for (int64_t head = 0; head < kv_heads; ++head) turn(heads + head, k + head * dim);
    const T* values = from + (heads + kv_heads) * dim;
    int64_t d = 0;
    for (; d + LANES <= kv_heads * dim; d += LANES) write16(v + d, read16(values + d));
    for (; d < kv_heads * dim; ++d) v[d] = from_float<KV>(to_float(values[d]));
  }
}

// The `top` largest logits of each row, the first of equals first, and their softmax.
template <class T>
void choose_experts(const void* logits_, int64_t rows, int64_t experts, int64_t top, void* shares_, int64_t* chosen) {
  std::vector<float> left(experts);
  for (int64_t row = 0; row < rows; ++row) {
    const T* logits = static_cast<const T*>(logits_) + row * experts;
    T* shares = static_cast<T*>(shares_) + row * top;
    for (int64_t e = 0; e < experts; ++e) left[e] = to_float(logits[e]);
    float total = 0, highest = 0;
    for (int64_t i = 0; i < top; ++i) {
      const int64_t best = std::max_element(left.begin(), left.end()) - left.begin();
      chosen[row * top + i] = best;
      if (i == 0) highest = left[best];
      total += std::exp(left[best] - highest);
      left[best] = -std::numeric_limits<float>::infinity();
    }
    for (int64_t i = 0; i < top; ++i)
      shares[i] = from_float<T>(std::exp(to_float(logits[chosen[row * top + i]]) - highest) / total);
  }
}

// -- decode attention -------------------------------------------------------------------------------------------------

struct Cache {
  int dtype;
  const void* storage;     // [2, blocks * kv_heads, block_tokens, head_dim]
  int64_t rows;            // blocks * kv_heads
  int64_t kv_heads, block_tokens, head_dim;
  const int64_t* table;    // [S, table_width]
  int64_t table_width;
  const int64_t* first;    // [S]: position of the first key in the table
  const int64_t* position; // [S]: of the query
  int64_t window;          // 0: unlimited

  int64_t head_bytes() const { return head_dim * (dtype == BFLOAT16 ? 2 : dtype == E4M3FN ? 1 : 4); }
};

// `rows` rows of `count` values, one after another, to rows that are `stride` apart.
template <class To, class From> void read_rows(To* to, int64_t stride, const void* from_, int64_t rows, int64_t count) {
  const From* from = static_cast<const From*>(from_);
  if (stride == count) count *= std::exchange(rows, 1);  // one long row
  for (int64_t row = 0; row < rows; ++row, to += stride, from += count) {
    int64_t d = 0;
#if defined(__AVX512F__)
    for (; d + LANES <= count; d += LANES) write16(to + d, read16(from + d));
#endif
    for (; d < count; ++d) to[d] = from_float<To>(to_float(from[d]));
  }
}
template <class To> using ReadRows = void (*)(To* to, int64_t stride, const void* from, int64_t rows, int64_t count);
template <class To> ReadRows<To> reader_of(int dtype) {
  return dtype == BFLOAT16 ? read_rows<To, BFloat16> : dtype == E4M3FN ? read_rows<To, E4M3> : read_rows<To, float>;
}

// The products of a query and 16 keys, rows of `padded` values.
__attribute__((always_inline)) inline Floats score_keys(const float* query, const float* keys, int64_t padded) {
  Floats scores;
  for (int64_t part = 0; part < LANES / PART; ++part, keys += PART * padded) {
    Part products[PART] = {};
    for (int64_t d = 0; d < padded; d += PART) {
      const Part own = load<Part>(query + d);
#pragma GCC unroll 16
      for (int j = 0; j < PART; ++j) products[j] += own * load<Part>(keys + j * padded + d);
    }
    part_of(scores, part) = sum_each(products);
  }
  return scores;
}

// sums = sums * keep + weights times `count` values, rows of `padded`.
inline void add_values(float* sums, float keep, const float* values, Floats weights, int64_t count, int64_t padded) {
#if defined(__AVX512F__)
  for (int64_t d = 0; d < padded; d += LANES) {
    Floats total = load<Floats>(sums + d) * keep;
    for (int64_t j = 0; j < count; ++j) total += load<Floats>(values + j * padded + d) * weights[j];
    save(sums + d, total);
  }
#else
  float own[LANES];
  save(own, weights);
  for (int64_t d = 0; d < padded; d += LANES) {
    Floats8 first = load<Floats8>(sums + d) * keep, second = load<Floats8>(sums + d + LANES / 2) * keep;
    for (int64_t j = 0; j < count; ++j) {
      first += load<Floats8>(values + j * padded + d) * own[j];
      second += load<Floats8>(values + j * padded + d + LANES / 2) * own[j];
    }
    save(sums + d, first);
    save(sums + d + LANES / 2, second);
  }
#endif
}

// The query heads of one KV head of one sequence: softmax is kept up to date tile by tile (at most 16 keys of a block).
template <class Q>
void attend_group(const Q* q, const float* sinks, Q* out, int64_t s, int64_t kv_head, int64_t group, const Cache& c,
                  float* scratch) {
  const int64_t dim = c.head_dim, padded = (dim + LANES - 1) / LANES * LANES;
  float* queries = scratch;                 // [group, padded]
  float* sums = queries + group * padded;   // [group, padded]
  float* keys = sums + group * padded;      // [16, padded]
  float* values = keys + LANES * padded;    // [16, padded]
  float* share = values + LANES * padded;   // [group, 16]: a sum in 16 parts
  float* top = share + group * LANES;       // [group]
  std::fill(queries, top, 0.0f);
  const float scale = 1.0f / std::sqrt(float(dim));
  for (int64_t g = 0; g < group; ++g) {
    read_rows<float, Q>(queries + g * padded, padded, q + g * dim, 1, dim);
    for (int64_t d = 0; d < dim; ++d) queries[g * padded + d] *= scale;
    top[g] = sinks[g];
    share[g * LANES] = 1.0f;  // the sink's own
  }
  const ReadRows<float> read = reader_of<float>(c.dtype);
  const char* pool_k = static_cast<const char*>(c.storage);
  const char* pool_v = pool_k + c.rows * c.block_tokens * c.head_bytes();
  const int64_t end = c.position[s] + 1;
  int64_t key = std::max(c.first[s], c.window ? end - c.window : 0);
  while (key < end) {
    const int64_t slot = key - c.first[s], offset = slot % c.block_tokens;
    const int64_t count = std::min({int64_t(LANES), c.block_tokens - offset, end - key});
    const int64_t block = c.table[s * c.table_width + slot / c.block_tokens];
    const int64_t at = ((block * c.kv_heads + kv_head) * c.block_tokens + offset) * c.head_bytes();
    read(keys, padded, pool_k + at, count, dim);
    read(values, padded, pool_v + at, count, dim);
    for (int64_t g = 0; g < group; ++g) {
      Floats scores = score_keys(queries + g * padded, keys, padded);
      for (int j = int(count); j < LANES; ++j) scores[j] = -std::numeric_limits<float>::infinity();
      Part best = part_of(scores, 0);
      for (int i = 1; i < LANES / PART; ++i) best = larger(best, part_of(scores, i));
      const float highest = std::max(top[g], max_lane(best));
      const float keep = highest == top[g] ? 1.0f : std::exp(top[g] - highest);
      Floats weights;
      for (int i = 0; i < LANES / PART; ++i) {
        float* total = share + g * LANES + i * PART;
        part_of(weights, i) = exponential(part_of(scores, i) - highest);
        save(total, load<Part>(total) * keep + part_of(weights, i));
      }
      top[g] = highest;
      add_values(sums + g * padded, keep, values, weights, count, padded);
    }
    key += count;
  }
  for (int64_t g = 0; g < group; ++g) {
    const float factor = 1.0f / sum_lanes(load<Floats>(share + g * LANES));
    for (int64_t d = 0; d < dim; ++d) out[g * dim + d] = from_float<Q>(sums[g * padded + d] * factor);
  }
}

template <class Q>
void attend_all(const void* q, const float* sinks, void* out, int64_t sequences, int64_t heads, const Cache& c,
                int threads) {
  const int64_t group = heads / c.kv_heads, padded = (c.head_dim + LANES - 1) / LANES * LANES;
  const int64_t work = sequences * heads * c.head_dim * c.table_width * c.block_tokens;
#pragma omp parallel num_threads(threads) if (work > PARALLEL_WORK)
  {
    std::vector<float> scratch((2 * group + 2 * LANES) * padded + (LANES + 1) * group);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < sequences * c.kv_heads; ++item) {
      const int64_t s = item / c.kv_heads, kv_head = item % c.kv_heads;
      const int64_t at = (s * heads + kv_head * group) * c.head_dim;
      attend_group<Q>(static_cast<const Q*>(q) + at, sinks + kv_head * group, static_cast<Q*>(out) + at, s,
                      kv_head, group, c, scratch.data());
    }
  }
}

// -- matrices ---------------------------------------------------------------------------------------------------------
//
// A weight matrix lies in tiles of 16 rows (outputs), inside a tile column by column, so that one load gives 16 rows and
// no sum runs across lanes. Tiles come in pairs: gate and up of the same 16 hidden values, or 32 outputs of `down`.

constexpr uint16_t E2M1_BFLOAT16[16] = {0,      0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                                        0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
constexpr float E2M1_FLOAT[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};
constexpr int MAX_TOKENS = 8;  // tokens that go through a pair of tiles at a time

// Each `multiply`: sums[r][n] += tile r of the pair times x[n], over `columns`.
//
// MXFP4: 64 bytes hold 8 columns of a tile. Half word (row, p) has columns p, p + 2, p + 4, p + 6 in its four nibbles,
// so that one shift brings a pair of columns of all rows into the low bits that the permutations look at.

#if defined(__AVX512F__)

inline Floats dot_pairs(Floats sum, Words weights, uint32_t x) {
#if defined(__AVX512BF16__)
  return Floats(_mm512_dpbf16_ps(__m512(sum), (__m512bh)(weights), (__m512bh)(_mm512_set1_epi32(int(x)))));
#else
  sum += bits<Floats>(weights << 16) * bits<float>(x << 16);
  return sum + bits<Floats>(weights & 0xFFFF0000u) * bits<float>(x & 0xFFFF0000u);
#endif
}

// The E2M1 codes in the low 4 bits of each half word (the bits above are ignored), as bfloat16.
inline Words decode_pairs(Words codes) {
#if defined(__AVX512BW__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(E2M1_BFLOAT16));
  return Words(_mm512_permutexvar_epi16(__m512i(codes), _mm512_broadcast_i64x4(half)));
#else
  Words value;
  for (int i = 0; i < LANES; ++i)
    value[i] = E2M1_BFLOAT16[codes[i] & 15] | uint32_t(E2M1_BFLOAT16[(codes[i] >> 16) & 15]) << 16;
  return value;
#endif
}
// The same for the low 4 bits of each word, as float32.
inline Floats decode_singles(Words codes) {
  return Floats(_mm512_permutexvar_ps(__m512i(codes), _mm512_loadu_ps(E2M1_FLOAT)));
}

template <int N> void multiply(Floats (&sums)[2][N], const float* pair, const uint8_t*, const float* const* x, int64_t columns) {
  for (int64_t k = 0; k < columns; ++k) {
    const Floats first = load<Floats>(pair + k * LANES), second = load<Floats>(pair + (columns + k) * LANES);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sums[0][n] += first * x[n][k];
      sums[1][n] += second * x[n][k];
    }
  }
}

template <int N> void multiply(Floats (&sums)[2][N], const BFloat16* pair, const uint8_t*, const BFloat16* const* x, int64_t columns) {
  for (int64_t k = 0; k < columns; k += 2) {
    const Words first = load<Words>(pair + k * LANES), second = load<Words>(pair + (columns + k) * LANES);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const uint32_t own = load<uint32_t>(x[n] + k);
      sums[0][n] = dot_pairs(sums[0][n], first, own);
      sums[1][n] = dot_pairs(sums[1][n], second, own);
    }
  }
}

inline Floats decode_scales(const uint8_t* from) {  // E8M0: 2^(byte - 127)
  return bits<Floats>(widen(load<Bytes16>(from)) << 23);
}

template <int N> void multiply(Floats (&sums)[2][N], const uint8_t* pair, const uint8_t* scales, const BFloat16* const* x, int64_t columns) {
  for (int tile = 0; tile < 2; ++tile) {
    for (int64_t k = 0; k < columns; k += MX_BLOCK) {
      Floats own[N] = {};
#pragma GCC unroll 4
      for (int c = 0; c < MX_BLOCK; c += 8) {
        const Words codes = load<Words>(pair + (tile * columns + k + c) * (LANES / 2));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Words weights = decode_pairs(codes >> (4 * i));
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) own[n] = dot_pairs(own[n], weights, load<uint32_t>(x[n] + k + c + 2 * i));
        }
      }
      const Floats scale = decode_scales(scales + (tile * columns + k) / MX_BLOCK * LANES);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[tile][n] += own[n] * scale;
    }
  }
}

template <int N> void multiply(Floats (&sums)[2][N], const uint8_t* pair, const uint8_t* scales, const float* const* x, int64_t columns) {
  for (int tile = 0; tile < 2; ++tile) {
    for (int64_t k = 0; k < columns; k += MX_BLOCK) {
      Floats own[N] = {};
#pragma GCC unroll 4
      for (int c = 0; c < MX_BLOCK; c += 8) {
        const Words codes = load<Words>(pair + (tile * columns + k + c) * (LANES / 2));
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const Floats weights = decode_singles(codes >> (4 * (i / 2) + 16 * (i % 2)));
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) own[n] += weights * x[n][k + c + i];
        }
      }
      const Floats scale = decode_scales(scales + (tile * columns + k) / MX_BLOCK * LANES);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[tile][n] += own[n] * scale;
    }
  }
}

#else

// Half a tile at a time: sums of 16 lanes for 8 tokens would not fit into the registers. `run(own, tile, half)` makes the
// sums of 8 rows.
template <int N, class Run> inline void multiply_halves(Floats (&sums)[2][N], Run&& run) {
  for (int64_t part = 0; part < 4; ++part) {
    Floats8 own[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) own[n] = part_of(sums[part / 2][n], part % 2);
    run(own, part / 2, part % 2);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) part_of(sums[part / 2][n], part % 2) = own[n];
  }
}

template <int N> void multiply(Floats (&sums)[2][N], const float* pair, const uint8_t*, const float* const* x, int64_t columns) {
  multiply_halves<N>(sums, [&](Floats8 (&own)[N], int64_t tile, int64_t half) {
    const float* weights = pair + tile * columns * LANES + half * (LANES / 2);
    for (int64_t k = 0; k < columns; ++k) {
      const Floats8 column = load<Floats8>(weights + k * LANES);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) own[n] += column * x[n][k];
    }
  });
}

template <int N> void multiply(Floats (&sums)[2][N], const BFloat16* pair, const uint8_t*, const float* const* x, int64_t columns) {
  multiply_halves<N>(sums, [&](Floats8 (&own)[N], int64_t tile, int64_t half) {
    const BFloat16* weights = pair + tile * columns * LANES + half * LANES;  // two columns of 8 rows
    for (int64_t k = 0; k < columns; k += 2) {
      const Words8 both = load<Words8>(weights + k * LANES);
      const Floats8 even = bits<Floats8>(both << 16), odd = bits<Floats8>(both & 0xFFFF0000u);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) own[n] += even * x[n][k];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) own[n] += odd * x[n][k + 1];
    }
  });
}

// Eight E2M1 codes in the low 4 bits of each word (the bits above are ignored), as float32.
inline Floats8 decode_singles(Words8 codes) {
#if defined(__AVX2__)  // the low 3 bits choose the size, the fourth is the sign
  const Floats8 size = Floats8(_mm256_permutevar8x32_ps(_mm256_loadu_ps(E2M1_FLOAT), __m256i(codes)));
  return bits<Floats8>(bits<Words8>(size) | ((codes << 28) & 0x80000000u));
#else
  Floats8 value;
  for (int i = 0; i < LANES / 2; ++i) value[i] = E2M1_FLOAT[codes[i] & 15];
  return value;
#endif
}

inline Floats8 decode_scales(const uint8_t* from) {  // E8M0: 2^(byte - 127)
#if defined(__AVX2__)
  return bits<Floats8>(Words8(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))) << 23);
#else
  Words8 words;
  for (int i = 0; i < LANES / 2; ++i) words[i] = from[i];
  return bits<Floats8>(words << 23);
#endif
}

template <int N> void multiply(Floats (&sums)[2][N], const uint8_t* pair, const uint8_t* scales, const float* const* x, int64_t columns) {
  multiply_halves<N>(sums, [&](Floats8 (&own)[N], int64_t tile, int64_t half) {
    for (int64_t k = 0; k < columns; k += MX_BLOCK) {
      Floats8 block[N] = {};
      for (int c = 0; c < MX_BLOCK; c += 8) {
        const Words8 codes = load<Words8>(pair + (tile * columns + k + c) * (LANES / 2) + half * sizeof(Words8));
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const Floats8 weights = decode_singles(codes >> (4 * (i / 2) + 16 * (i % 2)));
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) block[n] += weights * x[n][k + c + i];
        }
      }
      const Floats8 scale = decode_scales(scales + (tile * columns + k) / MX_BLOCK * LANES + half * (LANES / 2));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) own[n] += block[n] * scale;
    }
  });
}

#endif

template <int N, class W, class X, class Finish>
void multiply_rows(const W* pair, const uint8_t* scales, const X* const* x, int64_t columns, Finish&& finish) {
  Floats sums[2][N] = {};
  multiply<N>(sums, pair, scales, x, columns);
  for (int n = 0; n < N; ++n) finish(n, sums[0][n], sums[1][n]);
}

// A pair of tiles times any number of rows, in groups of nearly equal size.
template <class W, class X, class Row, class Finish>
void for_rows(int64_t rows, const W* pair, const uint8_t* scales, int64_t columns, Row&& row, Finish&& finish) {
  const int64_t groups = (rows + MAX_TOKENS - 1) / MAX_TOKENS;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t from = rows * i / groups, count = rows * (i + 1) / groups - from;
    const X* x[MAX_TOKENS];
    for (int64_t n = 0; n < count; ++n) x[n] = row(from + n);
    auto done = [&](int n, Floats a, Floats b) { finish(from + n, a, b); };
    switch (count) {
      case 1: multiply_rows<1>(pair, scales, x, columns, done); break;
      case 2: multiply_rows<2>(pair, scales, x, columns, done); break;
      case 3: multiply_rows<3>(pair, scales, x, columns, done); break;
      case 4: multiply_rows<4>(pair, scales, x, columns, done); break;
      case 5: multiply_rows<5>(pair, scales, x, columns, done); break;
      case 6: multiply_rows<6>(pair, scales, x, columns, done); break;
      case 7: multiply_rows<7>(pair, scales, x, columns, done); break;
      default: multiply_rows<8>(pair, scales, x, columns, done);
    }
  }
}

// Values as the products read them: where they are, or widened.
template <class X> struct Operands {
  const Operand<X>* values;

  Operands(const void* from, int64_t count) {
    if constexpr (std::is_same_v<X, Operand<X>>) {
      values = static_cast<const X*>(from);
    } else {
      room.reset(new Operand<X>[count]);
      read_rows<Operand<X>, X>(room.get(), count, from, 1, count);
      values = room.get();
    }
  }

 private:
  std::unique_ptr<Operand<X>[]> room;
};

// Any number of rows times a matrix of whole pairs of tiles, of whose outputs the first `outputs` exist.
template <class X>
void multiply_all(const void* weights, const float* bias, const void* x_, int64_t rows, int64_t inputs, int64_t outputs,
                  void* out_, int threads) {
  const int64_t pairs = (outputs + 2 * LANES - 1) / (2 * LANES);
  const Operands<X> x(x_, rows * inputs);
  X* out = static_cast<X*>(out_);
#pragma omp parallel for num_threads(threads) if (rows * inputs * outputs > PARALLEL_WORK)
  for (int64_t two = 0; two < pairs; ++two) {
    const int64_t at = two * 2 * LANES, width = std::min(outputs - at, int64_t(2 * LANES));
    const Floats first = load<Floats>(bias + at), second = load<Floats>(bias + at + LANES);
    for_rows<X, Operand<X>>(
        rows, static_cast<const X*>(weights) + at * inputs, nullptr, inputs,
        [&](int64_t n) { return x.values + n * inputs; },
        [&](int64_t n, Floats a, Floats b) {
          X* to = out + n * outputs + at;
          if (width == 2 * LANES) {
            write16(to, a + first);
            write16(to + LANES, b + second);
            return;
          }
          const Floats sums[2] = {a + first, b + second};
          for (int64_t d = 0; d < width; ++d) to[d] = from_float<X>(sums[d / LANES][d % LANES]);
        });
  }
}

// -- prefill attention ------------------------------------------------------------------------------------------------
//
// 32 keys at a time, which start at a multiple of 32: the order of a query's sums depends on its position alone, neither
// on how its prompt was cut into chunks nor on what else is in the batch. Both products are those of the matrices above:
// queries times a pair of tiles of keys, and shares times pairs of tiles of values.

constexpr int KEYS = 2 * LANES;
constexpr int64_t TILE_ROWS = 128;  // of queries and heads that share the keys once they are in tiles

struct Chunk {
  int64_t length, start;  // tokens, position of the first
  int64_t row;            // of the first token in q and in the chunks' own K and V
  int64_t first_key;      // position of the first key in the blocks
  const int64_t* blocks;
};

struct Prefill {
  const Cache& cache;
  const char* own;        // [2, rows, kv_heads, head_dim], the halves own_stride bytes apart
  int64_t own_stride;
  std::vector<Chunk> chunks;

  // The bytes of the key at `position`; its value's are `half(...)` further on. Null before the first and after the last.
  const char* key(const Chunk& chunk, int64_t kv_head, int64_t position) const {
    if (position >= chunk.start + chunk.length) return nullptr;
    if (position >= chunk.start)
      return own + ((chunk.row + position - chunk.start) * cache.kv_heads + kv_head) * cache.head_bytes();
    const int64_t slot = position - chunk.first_key;
    if (slot < 0) return nullptr;
    const int64_t row = chunk.blocks[slot / cache.block_tokens] * cache.kv_heads + kv_head;
    return static_cast<const char*>(cache.storage) + (row * cache.block_tokens + slot % cache.block_tokens) * cache.head_bytes();
  }
  int64_t half(const Chunk& chunk, int64_t position) const {
    return position >= chunk.start ? own_stride : cache.rows * cache.block_tokens * cache.head_bytes();
  }
};

// 32 keys and their values, from `position` on, as the tiles that `multiply` reads: keys are rows of head_dim columns,
// values columns, of which 32 rows make a pair of tiles. What is not there is zero.
template <class Q> struct KeyTiles {
  int64_t dim, width;  // head_dim, and in whole pairs of tiles
  ReadRows<Q> read_rows;
  std::vector<Q> keys, values, rows;

  explicit KeyTiles(const Cache& c)
      : dim(c.head_dim), width((dim + KEYS - 1) / KEYS * KEYS), read_rows(reader_of<Q>(c.dtype)), keys(KEYS * dim),
        values(KEYS * width), rows(KEYS * width) {}

  void read(const Prefill& p, const Chunk& chunk, int64_t kv_head, int64_t position) {
    const char* from[KEYS];
    for (int64_t j = 0; j < KEYS; ++j) place(from[j] = p.key(chunk, kv_head, position + j), j);
    for (int64_t tile = 0; tile < 2; ++tile)
      for (int64_t d = 0; d < dim; d += PAIR)
        for (int64_t j = 0; j < LANES; ++j)
          std::memcpy(&keys[(tile * dim + d) * LANES + j * PAIR], &rows[(tile * LANES + j) * width + d], PAIR * sizeof(Q));
    for (int64_t j = 0; j < KEYS; ++j)
      if (from[j]) place(from[j] + p.half(chunk, position + j), j);
    for (int64_t d = 0; d < width; d += LANES)
      for (int64_t j = 0; j < KEYS; j += PAIR) {
        const Q* one = &rows[j * width + d];
        Q* to = &values[(d / LANES * KEYS + j) * LANES];
        if constexpr (PAIR == 1) save(to, read16(one));
        else save(to, wide(one) | wide(one + width) << 16);
      }
  }

 private:
  static constexpr int64_t PAIR = std::is_same_v<Q, float> ? 1 : 2;  // columns that lie side by side in a tile

  static Words wide(const Q* from) { return widen(load<Halves16>(from)); }
  void place(const char* from, int64_t row) {
    if (from) read_rows(&rows[row * width], width, from, 1, dim);
    else std::fill_n(&rows[row * width], width, Q{});
  }
};

// Queries [from, to) of a chunk, and of them the heads that share one KV head.
template <class Q>
void attend_chunk(const Prefill& p, const Chunk& chunk, int64_t kv_head, int64_t group, int64_t from,
                  int64_t to, const Operand<Q>* q, const float* sinks, Q* out) {
  const Cache& c = p.cache;
  const int64_t dim = c.head_dim, rows = (to - from) * group, heads = c.kv_heads * group;
  KeyTiles<Operand<Q>> tiles(c);
  Operand<Q> weights[MAX_TOKENS * KEYS] = {};
  std::vector<float> sums(rows * tiles.width), share(rows * LANES), top(rows);
  const auto at = [&](int64_t row) {  // in q and out
    return ((chunk.row + from + row / group) * heads + kv_head * group + row % group) * dim;
  };
  const auto position = [&](int64_t row) { return chunk.start + from + row / group; };
  const auto first_key = [&](int64_t row) {
    return std::max(chunk.first_key, c.window ? position(row) - c.window + 1 : 0);
  };
  for (int64_t row = 0; row < rows; ++row) {
    top[row] = sinks[kv_head * group + row % group];
    share[row * LANES] = 1.0f;  // the sink's own
  }
  const float scale = 1.0f / std::sqrt(float(dim));
  for (int64_t tile = first_key(0) / KEYS * KEYS; tile < chunk.start + to; tile += KEYS) {
    tiles.read(p, chunk, kv_head, tile);
    for (int64_t row = 0; row < rows; row += MAX_TOKENS) {
      const int count = int(std::min(int64_t(MAX_TOKENS), rows - row));
      if (tile > position(row + count - 1) || tile + KEYS <= first_key(row)) continue;
      const Operand<Q>* x[MAX_TOKENS];
      for (int n = 0; n < MAX_TOKENS; ++n) x[n] = q + at(row + std::min(n, count - 1));
      Floats scores[2][MAX_TOKENS] = {};
      multiply<MAX_TOKENS>(scores, tiles.keys.data(), nullptr, x, dim);
      float keep[MAX_TOKENS];
      for (int n = 0; n < MAX_TOKENS; ++n) x[n] = weights + n * KEYS;
      for (int n = 0; n < count; ++n) {
        const int32_t begin = int32_t(first_key(row + n) - tile), end = int32_t(position(row + n) - tile);
        constexpr int PARTS = LANES / PART;
        Part own[2 * PARTS], best = fill(-std::numeric_limits<float>::infinity());
        for (int i = 0; i < 2 * PARTS; ++i) {
          const PartInts key = LANE + i * PART, visible = (key >= begin) & (key <= end);
          const Part score = part_of(scores[i / PARTS][n], i % PARTS) * scale;
          own[i] = visible ? score : fill(-std::numeric_limits<float>::infinity());
          best = larger(best, own[i]);
        }
        const float before = top[row + n], highest = std::max(before, max_lane(best));
        keep[n] = highest == before ? 1.0f : std::exp(before - highest);
        top[row + n] = highest;
        float* total = share.data() + (row + n) * LANES;
        Part sum = load<Part>(total) * keep[n];
        for (int i = 0; i < 2 * PARTS; ++i) {
          own[i] = exponential(own[i] - highest);
          sum += own[i];
          write_part(weights + n * KEYS + i * PART, own[i]);
        }
        save(total, sum);
      }
      for (int64_t d = 0; d < tiles.width; d += KEYS) {
        Floats added[2][MAX_TOKENS] = {};
        multiply<MAX_TOKENS>(added, tiles.values.data() + d * KEYS, nullptr, x, KEYS);
        for (int n = 0; n < count; ++n)
          for (int i = 0; i < 2; ++i) {
            float* place = sums.data() + (row + n) * tiles.width + d + i * LANES;
            save(place, load<Floats>(place) * keep[n] + added[i][n]);
          }
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float factor = 1.0f / sum_lanes(load<Floats>(share.data() + row * LANES));
    for (int64_t d = 0; d < dim; ++d) out[at(row) + d] = from_float<Q>(sums[row * tiles.width + d] * factor);
  }
}

template <class Q>
void attend_chunks(const void* q, const void* own, int64_t own_stride, const float* sinks, void* out,
                   const int64_t* lengths, int64_t count, int64_t heads, const Cache& c, int threads) {
  Prefill prefill{c, static_cast<const char*>(own), own_stride * c.head_bytes() / c.head_dim, {}};
  int64_t rows = 0;
  for (int64_t i = 0; i < count; rows += lengths[i++])
    prefill.chunks.push_back({lengths[i], c.position[i], rows, c.first[i], c.table + i * c.table_width});
  const Operands<Q> queries(q, rows * heads * c.head_dim);
  const int64_t group = heads / c.kv_heads, step = std::max(int64_t(1), TILE_ROWS / group);
  struct Item { const Chunk* chunk; int64_t from; };
  std::vector<Item> items;
  int64_t work = 0;
  for (const Chunk& chunk : prefill.chunks)
    for (int64_t from = 0; from < chunk.length; from += step) {
      items.push_back({&chunk, from});
      work += std::min(step, chunk.length - from) * heads * c.head_dim * (chunk.start - chunk.first_key + from + step);
    }
#pragma omp parallel for num_threads(threads) if (work > PARALLEL_WORK) schedule(dynamic)
  for (int64_t i = int64_t(items.size()) * c.kv_heads - 1; i >= 0; --i) {  // the longest ones first
    const Item& item = items[i / c.kv_heads];
    attend_chunk<Q>(prefill, *item.chunk, i % c.kv_heads, group, item.from,
                    std::min(item.from + step, item.chunk->length), queries.values, sinks, static_cast<Q*>(out));
  }
}

// -- experts ---------------------------------------------------------------------------------------------------------

struct Experts {
  const void* gate_up;            // [E, hidden tiles, gate and up, D columns, 16], scales [.., D / 32, 16]
  const uint8_t* gate_up_scales;
  const void* down;               // [E, output tiles, F columns, 16]
  const uint8_t* down_scales;
  const float* gate_up_bias;      // [E, hidden tiles, gate and up, 16]
  const float* down_bias;         // [E, output tiles, 16]
  int64_t count, inputs, hidden, outputs;  // E, D, F in whole tiles, D in whole pairs of tiles
  float limit;
};

// Which rows of x each expert gets (experts that another rank holds have higher numbers, and get none here): rows of expert e are at [start[e], start[e + 1]) of the sorted lists.
struct Routing {
  std::vector<int64_t> start, token;
  std::vector<float> share;

  template <class T> Routing(const T* shares, const int64_t* chosen, int64_t tokens, int64_t top, int64_t experts)
      : start(experts + 1), token(tokens * top), share(tokens * top) {
    for (int64_t i = 0; i < tokens * top; ++i)
      if (chosen[i] < experts) ++start[chosen[i] + 1];
    for (int64_t e = 0; e < experts; ++e) start[e + 1] += start[e];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < tokens * top; ++i) {
      if (chosen[i] >= experts) continue;
      const int64_t place = next[chosen[i]]++;
      token[place] = i / top;
      share[place] = to_float(shares[i]);
    }
  }
};

inline Floats swiglu(Floats gates, Floats ups, float limit) {
  Floats result;
  for (int i = 0; i < LANES / PART; ++i) {
    const Part gate = smaller(part_of(gates, i), fill(limit));
    const Part up = larger(smaller(part_of(ups, i), fill(limit)), fill(-limit));
    part_of(result, i) = (up + 1.0f) * gate / (1.0f + exponential(gate * -1.702f));
  }
  return result;
}

#if defined(__AVX512F__)
constexpr int64_t EXPAND_ROWS = 24;  // rows from which MXFP4 tiles are expanded once instead of for every 8 rows

// A pair of MXFP4 tiles as the plain kernels read them; exact.
inline void expand_pair(const uint8_t* pair, const uint8_t* scales, int64_t columns, BFloat16* to) {
  for (int64_t k = 0; k < 2 * columns; k += MX_BLOCK) {
    const Floats scale = decode_scales(scales + k / MX_BLOCK * LANES);
    for (int c = 0; c < MX_BLOCK; c += 8)
      for (int i = 0; i < 4; ++i) {
        const Words own = decode_pairs(load<Words>(pair + (k + c) * (LANES / 2)) >> (4 * i));
        const Words even = bits<Words>(bits<Floats>(own << 16) * scale) >> 16;
        const Words odd = bits<Words>(bits<Floats>(own & 0xFFFF0000u) * scale) & 0xFFFF0000u;
        save(to + (k + c + 2 * i) * LANES, even | odd);
      }
  }
}

#endif

template <class W, class X, class Row, class Finish>
void for_expert_rows(int64_t rows, const W* pair, const uint8_t* scales, int64_t columns, std::vector<X>& room, Row&& row,
                     Finish&& finish) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<W, uint8_t> && std::is_same_v<X, BFloat16>) {
    if (rows > EXPAND_ROWS) {
      room.resize(2 * LANES * columns);
      expand_pair(pair, scales, columns, room.data());
      return for_rows<X, X>(rows, room.data(), nullptr, columns, row, finish);
    }
  }
#endif
  for_rows<W, X>(rows, pair, scales, columns, row, finish);
}

template <class W> constexpr int64_t elements(int64_t values) {  // of W that hold so many weights
  return std::is_same_v<W, uint8_t> ? values / 2 : values;
}

template <class W, class X>
void mix(const Experts& e, const void* x_, const void* shares, const int64_t* chosen, int64_t tokens, int64_t top,
         void* out_, float* sums, int threads) {
  const Operands<X> x(x_, tokens * e.inputs);
  const std::unique_ptr<Operand<X>[]> room_of_hidden(new Operand<X>[tokens * top * e.hidden]);
  Operand<X>* hidden = room_of_hidden.get();  // [tokens * top, e.hidden]
  const Routing routing(static_cast<const X*>(shares), chosen, tokens, top, e.count);
  const int64_t hidden_tiles = e.hidden / LANES, pairs = e.outputs / (2 * LANES);
#pragma omp parallel num_threads(threads) if (tokens * top * 3 * e.inputs * e.hidden > PARALLEL_WORK)
  {
    // Every thread has its own rows of each matrix, which it reads from end to end.
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t scale_columns = e.inputs / MX_BLOCK;
    std::vector<Operand<X>> room;
    for (int64_t i = 0; i < e.count; ++i) {
      const int64_t from = routing.start[i], rows = routing.start[i + 1] - from;
      if (rows == 0) continue;
      for (int64_t tile = hidden_tiles * me / team; tile < hidden_tiles * (me + 1) / team; ++tile) {
        const int64_t at = i * hidden_tiles + tile;
        const W* pair = static_cast<const W*>(e.gate_up) + elements<W>(at * 2 * LANES * e.inputs);
        const Floats gate_bias = load<Floats>(e.gate_up_bias + at * 2 * LANES);
        const Floats up_bias = load<Floats>(e.gate_up_bias + at * 2 * LANES + LANES);
        for_expert_rows<W, Operand<X>>(
            rows, pair, e.gate_up_scales + at * 2 * LANES * scale_columns, e.inputs, room,
            [&](int64_t n) { return x.values + routing.token[from + n] * e.inputs; },
            [&](int64_t n, Floats gate, Floats up) {
              write_operand<X>(hidden + (from + n) * e.hidden + tile * LANES,
                               swiglu(gate + gate_bias, up + up_bias, e.limit));
            });
      }
    }
#pragma omp barrier
    const int64_t first = pairs * me / team, last = pairs * (me + 1) / team;
    for (int64_t t = 0; t < tokens; ++t)
      std::fill(sums + t * e.outputs + first * 2 * LANES, sums + t * e.outputs + last * 2 * LANES, 0.0f);
    for (int64_t i = 0; i < e.count; ++i) {
      const int64_t from = routing.start[i], rows = routing.start[i + 1] - from;
      if (rows == 0) continue;
      for (int64_t two = first; two < last; ++two) {
        const int64_t at = (i * pairs + two) * 2 * LANES;
        const Floats bias[2] = {load<Floats>(e.down_bias + at), load<Floats>(e.down_bias + at + LANES)};
        for_expert_rows<W, Operand<X>>(
            rows, static_cast<const W*>(e.down) + elements<W>(at * e.hidden), e.down_scales + at * (e.hidden / MX_BLOCK),
            e.hidden, room, [&](int64_t n) { return hidden + (from + n) * e.hidden; },
            [&](int64_t n, Floats a, Floats b) {
              float* to = sums + routing.token[from + n] * e.outputs + two * 2 * LANES;
              const float share = routing.share[from + n];
              save(to, load<Floats>(to) + (a + bias[0]) * share);
              save(to + LANES, load<Floats>(to + LANES) + (b + bias[1]) * share);
            });
      }
    }
    X* out = static_cast<X*>(out_);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t d = first * 2 * LANES; d < std::min(last * 2 * LANES, e.inputs); ++d)
        out[t * e.inputs + d] = from_float<X>(sums[t * e.outputs + d]);
  }
}

}  // namespace

extern "C" {

void rms_norm(int dtype, const void* x, const float* weight, float eps, int64_t rows, int64_t width, void* out) {
  (dtype == BFLOAT16 ? normalize<BFloat16> : normalize<float>)(x, weight, eps, rows, width, out);
}

void linear(int dtype, const void* weights, const float* bias, const void* x, int64_t rows, int64_t inputs,
            int64_t outputs, void* out, int threads) {
  (dtype == BFLOAT16 ? multiply_all<BFloat16> : multiply_all<float>)(weights, bias, x, rows, inputs, outputs, out, threads);
}

void rotate(int dtype, int kv_dtype, const void* qkv, const void* cos, const void* sin, const int64_t* positions,
            int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, void* q, void* kv) {
  const auto run = [&](auto turn) { turn(qkv, cos, sin, positions, rows, heads, kv_heads, head_dim, q, kv); };
  if (dtype == BFLOAT16) {
    if (kv_dtype == BFLOAT16) run(rotate_rows<BFloat16, BFloat16>);
    else if (kv_dtype == E4M3FN) run(rotate_rows<BFloat16, E4M3>);
    else run(rotate_rows<BFloat16, float>);
  } else {
    if (kv_dtype == BFLOAT16) run(rotate_rows<float, BFloat16>);
    else if (kv_dtype == E4M3FN) run(rotate_rows<float, E4M3>);
    else run(rotate_rows<float, float>);
  }
}

// kv [2, tokens, kv_heads, row_bytes] to storage [2, pool_rows, block_tokens, row_bytes].
void write_cache(void* storage, int64_t pool_rows, int64_t block_tokens, int64_t row_bytes, const int64_t* rows,
                 const int64_t* offsets, const void* kv, int64_t tokens, int64_t kv_heads) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t i = 0; i < tokens * kv_heads; ++i) {
      const int64_t place = ((half * pool_rows + rows[i]) * block_tokens + offsets[i / kv_heads]) * row_bytes;
      std::memcpy(static_cast<char*>(storage) + place,
                  static_cast<const char*>(kv) + (half * tokens * kv_heads + i) * row_bytes, row_bytes);
    }
}

void route(int dtype, const void* logits, int64_t rows, int64_t experts, int64_t top, void* shares, int64_t* chosen) {
  (dtype == BFLOAT16 ? choose_experts<BFloat16> : choose_experts<float>)(logits, rows, experts, top, shares, chosen);
}

void decode_attention(int q_dtype, int kv_dtype, const void* q, const float* sinks, void* out, int64_t sequences,
                      int64_t heads, const void* storage, int64_t rows, int64_t kv_heads, int64_t block_tokens,
                      int64_t head_dim, const int64_t* table, int64_t table_width, const int64_t* first,
                      const int64_t* position, int64_t window, int threads) {
  const Cache c{kv_dtype, storage, rows, kv_heads, block_tokens, head_dim, table, table_width, first, position, window};
  (q_dtype == BFLOAT16 ? attend_all<BFloat16> : attend_all<float>)(q, sinks, out, sequences, heads, c, threads);
}

// own [2, rows, kv_heads, head_dim] as the cache stores it; position: of each chunk's first token.
void prefill_attention(int q_dtype, int kv_dtype, const void* q, const void* own, int64_t own_stride, const float* sinks,
                       void* out, const int64_t* lengths, int64_t chunks, int64_t heads, const void* storage, int64_t rows,
                       int64_t kv_heads, int64_t block_tokens, int64_t head_dim, const int64_t* table,
                       int64_t table_width, const int64_t* first, const int64_t* position, int64_t window, int threads) {
  const Cache c{kv_dtype, storage, rows, kv_heads, block_tokens, head_dim, table, table_width, first, position, window};
  const auto run = q_dtype == BFLOAT16 ? attend_chunks<BFloat16> : attend_chunks<float>;
  run(q, own, own_stride, sinks, out, lengths, chunks, heads, c, threads);
}

void expert_mixture(int weights, int x_dtype, const void* gate_up, const uint8_t* gate_up_scales, const void* down,
                    const uint8_t* down_scales, const float* gate_up_bias, const float* down_bias, int64_t count,
                    int64_t inputs, int64_t hidden, int64_t outputs, float limit, const void* x, const void* shares,
                    const int64_t* chosen, int64_t tokens, int64_t top, void* out, float* sums, int threads) {
  const Experts e{gate_up, gate_up_scales, down, down_scales, gate_up_bias, down_bias, count, inputs, hidden, outputs, limit};
  const auto run = [&](auto mixture) {
    mixture(e, x, shares, chosen, tokens, top, out, sums, threads);
  };
  if (weights == MXFP4) {
    if (x_dtype == BFLOAT16) run(mix<uint8_t, BFloat16>);
    else run(mix<uint8_t, float>);
  } else {
    if (x_dtype == BFLOAT16) run(mix<BFloat16, BFloat16>);
    else run(mix<float, float>);
  }
}

}

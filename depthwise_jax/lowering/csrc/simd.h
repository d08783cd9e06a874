// Vectors of one instruction set, and loads and stores of every element type as vectors of the type of the sums.
//
// Only loops.cc includes this file. It is compiled once per instruction set: everything is in an unnamed namespace,
// because the linker must not merge code of different instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T)), may_alias));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), may_alias, aligned(1)));
};

template <class T, int N>
inline typename VectorOf<T, N>::type load_vector(const void* p) {
  return *static_cast<const typename VectorOf<T, N>::unaligned*>(p);
}
template <class T, int N>
inline void store_vector(void* p, typename VectorOf<T, N>::type v) {
  *static_cast<typename VectorOf<T, N>::unaligned*>(p) = v;
}

// Each element type defines Sum, the type of its sums; lanes, how many of them a vector holds; the size of an element
// of y (stored_bytes) and of x (loaded_bytes); load and store. `load_partial` and `store_partial` touch n lanes only.
template <class Self, class Stored, class SumType>
struct ElementBase {
  using Sum = SumType;
  static constexpr int lanes = kVectorBytes / sizeof(Sum);
  static constexpr int stored_bytes = sizeof(Stored), loaded_bytes = stored_bytes;
  using V = typename VectorOf<Sum, lanes>::type;

  static inline V load_partial(const char* p, int n) {
    alignas(64) char buffer[lanes * stored_bytes] = {};
    std::memcpy(buffer, p, n * stored_bytes);
    return Self::load(buffer);
  }
  static inline void store_partial(char* p, V v, int n) {
    alignas(64) char buffer[lanes * stored_bytes];
    Self::store(buffer, v);
    std::memcpy(p, buffer, n * stored_bytes);
  }
};

template <class T>
struct Full : ElementBase<Full<T>, T, T> {
  using Base = ElementBase<Full<T>, T, T>;
  using V = typename Base::V;
  static inline V load(const char* p) { return load_vector<T, Base::lanes>(p); }
  static inline void store(char* p, V v) { store_vector<T, Base::lanes>(p, v); }
  static inline void stream(char* p, V v) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
    store(p, v);
#endif
  }
};
using F32 = Full<float>;
using F64 = Full<double>;

// The upper half of a float, rounded to nearest, ties to even. NaNs survive without a check: every operand was narrow
// once, its lower half is zero, and rounding carries nothing into the upper half.
struct BF16 : ElementBase<BF16, std::uint16_t, float> {
#if defined(__AVX512F__)
  // A permutation of words would do it at once, but takes turns with the multiplications on some processors.
  static inline V load(const char* p) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return reinterpret_cast<V>(_mm512_slli_epi32(words, 16));
  }
  static inline __m256i narrow(V v) {
    const __m512i bits = reinterpret_cast<__m512i>(v);
    __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
    const __m512i from = _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d,
                                           0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_maskz_permutexvar_epi16(0xffff, from, rounded));
  }
  static inline void store(char* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
#elif defined(__AVX2__)
  static inline V load(const char* p) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return reinterpret_cast<V>(_mm256_slli_epi32(words, 16));
  }
  static inline __m128i narrow(V v) {
    const __m256i bits = reinterpret_cast<__m256i>(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i words = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static inline void store(char* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v)); }
#else
  using U16 = VectorOf<std::uint16_t, lanes>::type;
  using U32 = VectorOf<std::uint32_t, lanes>::type;
  static inline V load(const char* p) {
    return reinterpret_cast<V>(__builtin_convertvector(load_vector<std::uint16_t, lanes>(p), U32) << 16);
  }
  static inline U16 narrow(V v) {
    const U32 bits = reinterpret_cast<U32>(v);
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, U16);
  }
  static inline void store(char* p, V v) { store_vector<std::uint16_t, lanes>(p, narrow(v)); }
#endif
};

struct F16 : ElementBase<F16, std::uint16_t, float> {
#if defined(__AVX512F__)
  static inline V load(const char* p) {
    return reinterpret_cast<V>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  static inline __m256i narrow(V v) {
    return _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline void store(char* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
#elif defined(__AVX2__)
  static inline V load(const char* p) {
    return reinterpret_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static inline __m128i narrow(V v) {
    return _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline void store(char* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v)); }
#elif defined(__aarch64__)
  static inline V load(const char* p) {
    return reinterpret_cast<V>(vcvt_f32_f16(vreinterpret_f16_u16(load_vector<std::uint16_t, lanes>(p))));
  }
  static inline void store(char* p, V v) {
    store_vector<std::uint16_t, lanes>(p, vreinterpret_u16_f16(vcvt_f16_f32(reinterpret_cast<float32x4_t>(v))));
  }
#else
  // IEEE 754 binary16 without an instruction for it.
  static inline float widen(std::uint16_t h) {
    const std::uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    std::uint32_t bits;
    if (magnitude >= 0x7c00u) {
      bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x400u) {
      bits = (magnitude << 13) + 0x38000000u;
    } else {
      const float value = static_cast<float>(magnitude) * 0x1p-24f;
      std::memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  static inline std::uint16_t narrow(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
    if (bits >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (bits < 0x38800000u) {  // adding 0.5 puts the last bit of a subnormal half at the last bit of the sum
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      magnitude += 0.5f;
      std::memcpy(&bits, &magnitude, 4);
      return static_cast<std::uint16_t>(sign | (bits - 0x3f000000u));
    }
    return static_cast<std::uint16_t>(sign | (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13);
  }
  static inline V load(const char* p) {
    V v;
    for (int i = 0; i < lanes; ++i) {
      std::uint16_t h;
      std::memcpy(&h, p + 2 * i, 2);
      v[i] = widen(h);
    }
    return v;
  }
  static inline void store(char* p, V v) {
    for (int i = 0; i < lanes; ++i) {
      const std::uint16_t h = narrow(v[i]);
      std::memcpy(p + 2 * i, &h, 2);
    }
  }
#endif
};

// The same for an input that is already in the type of the sums.
template <class E>
struct Staged : E {
  static constexpr int loaded_bytes = sizeof(typename E::Sum);
  static inline typename E::V load(const char* p) { return load_vector<typename E::Sum, E::lanes>(p); }
};

}  // namespace

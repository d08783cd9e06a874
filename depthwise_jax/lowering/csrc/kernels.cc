// The innermost loops. Compiled once per instruction set, into the namespace DEPTHWISE_TARGET.
//
// A tile kernel keeps a tile of sums in registers, reads each vector of input once per row and adds it, times each tap,
// to all the sums that it reaches ("input stationary"). The columns that may lie outside the input are tested one by
// one where they are read: what is outside contributes nothing, whatever the taps hold. No load or multiplication is
// spent on it, so the borders of small maps cost nothing.
#include "kernels.h"
#include "simd.h"

namespace {

using namespace depthwise;

#define UNROLL _Pragma("GCC unroll 64")

template <class E>
inline typename E::V broadcast(typename E::Sum value) {
  return typename E::V{} + value;
}

template <class E>
inline typename E::V clamp(typename E::V v, Activation activation) {
  // The order of the operands keeps what is no number.
  const auto low = broadcast<E>(0), high = broadcast<E>(6);
  if (activation != Activation::identity) v = v < low ? low : v;
  if (activation == Activation::relu6) v = v > high ? high : v;
  return v;
}

template <int n>
struct Constant {
  static constexpr int value = n;
};

// The first channel of the vector at c: vectors that would pass the end are moved back over their neighbours.
inline Index vector_start(Index c, Index end, int lanes) { return c + lanes > end ? end - lanes : c; }

template <class E, int Taps, int Stride, int Width, int Height>
void tile(const Tile& t) {
  using V = typename E::V;
  using A = typename E::Sum;
  constexpr int kColumns = (Width - 1) * Stride + Taps;
  // Of the columns read, only as many as reach beyond the first or the last output may be outside.
  constexpr int kEdge = Taps - 1;
  const Index first = t.column < 0 ? -t.column : 0;
  const Index last = t.columns - t.column < kColumns ? t.columns - t.column : kColumns;
  const Index pitch = t.pitch * E::size;
  for (Index next = t.begin; next < t.end; next += E::lanes) {
    const Index c = vector_start(next, t.end, E::lanes);
    if (t.ahead) {
      for (Index r = 0; r < t.ahead_rows; ++r) {
        const char* p = t.ahead + r * t.ahead_pitch + (t.column + kEdge) * pitch + c * E::size;
        UNROLL
        for (int j = 0; j < Width * Stride; ++j) __builtin_prefetch(p + j * pitch, 0, 2);
      }
    }
    V sum[Height][Width];
    V start = V{};
    if (t.bias) start = load_vector<A, E::lanes>(t.bias + c * sizeof(A));
    UNROLL
    for (int h = 0; h < Height; ++h) {
      UNROLL
      for (int j = 0; j < Width; ++j) sum[h][j] = start;
    }
    const Index x_offset = t.column * pitch + c * E::size;
    const Index tap_pitch = t.tap_pitch * static_cast<Index>(sizeof(A));
    auto add = [&](const Row& row, auto from, auto to) __attribute__((always_inline)) {
      constexpr int kFrom = decltype(from)::value, kTo = decltype(to)::value;
      V w[Height][Taps];
      UNROLL
      for (int h = kFrom; h < kTo; ++h) {
        UNROLL
        for (int k = 0; k < Taps; ++k) w[h][k] = load_vector<A, E::lanes>(row.w[h] + k * tap_pitch + c * sizeof(A));
      }
      const char* x = row.x + x_offset;
      UNROLL
      for (int i = 0; i < kColumns; ++i) {
        if ((i < kEdge && i < first) || (i >= kColumns - kEdge && i >= last)) continue;
        const V v = E::load(x + i * pitch);
        UNROLL
        for (int h = kFrom; h < kTo; ++h) {
          UNROLL
          for (int k = 0; k < Taps; ++k) {
            if ((i - k) % Stride == 0 && i >= k && (i - k) / Stride < Width) sum[h][(i - k) / Stride] += v * w[h][k];
          }
        }
      }
    };
    for (Index r = 0; r < t.count; ++r) {
      const Row& row = t.rows[r];
      if constexpr (Height == 1) {
        add(row, Constant<0>{}, Constant<1>{});
      } else {
        if (row.w[0] && row.w[1]) {
          add(row, Constant<0>{}, Constant<2>{});
        } else if (row.w[0]) {
          add(row, Constant<0>{}, Constant<1>{});
        } else {
          add(row, Constant<1>{}, Constant<2>{});
        }
      }
    }
    const Index y_pitch = t.y_pitch * E::size;
    UNROLL
    for (int h = 0; h < Height; ++h) {
      char* y = t.y[h] + c * E::size;
      if (t.stream) {
        UNROLL
        for (int j = 0; j < Width; ++j) E::stream(y + j * y_pitch, clamp<E>(sum[h][j], t.activation));
      } else {
        UNROLL
        for (int j = 0; j < Width; ++j) E::store(y + j * y_pitch, clamp<E>(sum[h][j], t.activation));
      }
    }
  }
}

// Many taps side by side at stride one: eight at a time, then what is left, into the same sums. Any column may be outside.
template <class E, int Width>
void wide_tile(const Tile& t) {
  using V = typename E::V;
  using A = typename E::Sum;
  const Index pitch = t.pitch * E::size, tap_pitch = t.tap_pitch * static_cast<Index>(sizeof(A));
  for (Index next = t.begin; next < t.end; next += E::lanes) {
    const Index c = vector_start(next, t.end, E::lanes);
    V sum[Width];
    V start = V{};
    if (t.bias) start = load_vector<A, E::lanes>(t.bias + c * sizeof(A));
    UNROLL
    for (int j = 0; j < Width; ++j) sum[j] = start;
    auto add = [&](const Row& row, Index tap, auto taps) __attribute__((always_inline)) {
      constexpr int kTaps = decltype(taps)::value, kColumns = Width - 1 + kTaps;
      const Index column = t.column + tap;
      const Index first = column < 0 ? -column : 0;
      const Index last = t.columns - column < kColumns ? t.columns - column : kColumns;
      if (first >= last) return;
      V w[kTaps];
      UNROLL
      for (int k = 0; k < kTaps; ++k) w[k] = load_vector<A, E::lanes>(row.w[0] + (tap + k) * tap_pitch + c * sizeof(A));
      const char* x = row.x + column * pitch + c * E::size;
      UNROLL
      for (int i = 0; i < kColumns; ++i) {
        if (i < first || i >= last) continue;
        const V v = E::load(x + i * pitch);
        UNROLL
        for (int k = 0; k < kTaps; ++k) {
          if (i >= k && i - k < Width) sum[i - k] += v * w[k];
        }
      }
    };
    for (Index r = 0; r < t.count; ++r) {
      Index tap = 0;
      for (; tap + 8 <= t.taps; tap += 8) add(t.rows[r], tap, Constant<8>{});
      for (; tap + 2 <= t.taps; tap += 2) add(t.rows[r], tap, Constant<2>{});
      if (tap < t.taps) add(t.rows[r], tap, Constant<1>{});
    }
    UNROLL
    for (int j = 0; j < Width; ++j) E::store(t.y[0] + (j * t.y_pitch + c) * E::size, clamp<E>(sum[j], t.activation));
  }
}

// Any taps, step and stride, and any number of channels: each tap takes the tile's row of input at its own offset.
template <class E, int Width>
void general_tile(const Tile& t) {
  using V = typename E::V;
  using A = typename E::Sum;
  const Index pitch = t.pitch * E::size;
  for (Index next = t.begin; next < t.end; next += E::lanes) {
    const bool some = t.end - t.begin < E::lanes;
    const int lanes = some ? static_cast<int>(t.end - t.begin) : E::lanes;
    const Index c = some ? next : vector_start(next, t.end, E::lanes);
    auto sums_at = [&](const char* p) __attribute__((always_inline)) {
      return some ? Full<A>::load_some(p, lanes) : load_vector<A, E::lanes>(p);
    };
    V start = V{};
    if (t.bias) start = sums_at(t.bias + c * sizeof(A));
    V sum[Width];
    UNROLL
    for (int j = 0; j < Width; ++j) sum[j] = start;
    const Index jump = t.stride * pitch;
    for (Index r = 0; r < t.count; ++r) {
      const char* row = t.rows[r].x + c * E::size;
      const char* taps = t.rows[r].w[0] + c * sizeof(A);
      for (Index k = 0; k < t.taps; ++k) {
        const Index column = t.column + k * t.step;
        const V w = sums_at(taps + k * t.tap_pitch * static_cast<Index>(sizeof(A)));
        const char* x = row + column * pitch;
        if (!some && column >= 0 && column + (Width - 1) * t.stride < t.columns) {
          UNROLL
          for (int j = 0; j < Width; ++j) sum[j] += E::load(x + j * jump) * w;
        } else {
          // The outputs whose column is inside: from <= j < to.
          const Index from = column < 0 ? (-column + t.stride - 1) / t.stride : 0;
          const Index to = column < t.columns ? (t.columns - column + t.stride - 1) / t.stride : 0;
          UNROLL
          for (int j = 0; j < Width; ++j) {
            if (j < from || j >= to) continue;
            const char* p = x + j * jump;
            sum[j] += (some ? E::load_some(p, lanes) : E::load(p)) * w;
          }
        }
      }
    }
    UNROLL
    for (int j = 0; j < Width; ++j) {
      char* y = t.y[0] + (j * t.y_pitch + c) * E::size;
      const V v = clamp<E>(sum[j], t.activation);
      if (some) {
        E::store_some(y, v, lanes);
      } else if (t.stream) {
        E::stream(y, v);
      } else {
        E::store(y, v);
      }
    }
  }
}

// Stores the lanes from `skip` on: those before were moved back over, and are in the vector before.
template <class E>
inline void store_sum(char* p, typename E::V v, Index skip) {
  using A = typename E::Sum;
  if (skip == 0) {
    store_vector<A, E::lanes>(p, v);
  } else {
    alignas(64) char buffer[kBytes];
    store_vector<A, E::lanes>(buffer, v);
    std::memcpy(p + skip * sizeof(A), buffer + skip * sizeof(A), kBytes - skip * sizeof(A));
  }
}

// The sums of Height rows of Taps taps stay in registers while the rows of g and of x pass by.
template <class E, int Taps, int Height, int Stride, int Width>
void grad(const Grad& t) {
  using V = typename E::V;
  using A = typename E::Sum;
  const Index pitch = t.pitch * E::size;
  for (Index next = t.begin; next < t.end; next += E::lanes) {
    const Index c = vector_start(next, t.end, E::lanes);
    V sum[Height][Taps];
    char* dw = t.dw + c * sizeof(A);
    UNROLL
    for (int h = 0; h < Height; ++h) {
      UNROLL
      for (int k = 0; k < Taps; ++k) sum[h][k] = load_vector<A, E::lanes>(dw + (h * t.row_pitch + k * t.pitch) * sizeof(A));
    }
    auto columns = [&](const GradRow& row, Index output, auto width) __attribute__((always_inline)) {
      constexpr int kWidth = decltype(width)::value;
      constexpr int kColumns = (kWidth - 1) * Stride + Taps;
      constexpr int kEdge = Taps - 1;
      const Index column = t.column + output * Stride;
      const Index first = column < 0 ? -column : 0;
      const Index last = t.columns - column < kColumns ? t.columns - column : kColumns;
      V g[kWidth];
      const char* p = row.g + output * pitch + c * E::size;
      UNROLL
      for (int j = 0; j < kWidth; ++j) g[j] = E::load(p + j * pitch);
      UNROLL
      for (int h = 0; h < Height; ++h) {
        if (!row.x[h]) continue;
        const char* x = row.x[h] + column * pitch + c * E::size;
        UNROLL
        for (int i = 0; i < kColumns; ++i) {
          if ((i < kEdge && i < first) || (i >= kColumns - kEdge && i >= last)) continue;
          const V v = E::load(x + i * pitch);
          UNROLL
          for (int k = 0; k < Taps; ++k) {
            if ((i - k) % Stride == 0 && i >= k && (i - k) / Stride < kWidth) sum[h][k] += v * g[(i - k) / Stride];
          }
        }
      }
    };
    for (Index r = 0; r < t.count; ++r) {
      Index output = 0;
      for (; output + Width <= t.outputs; output += Width) columns(t.rows[r], output, Constant<Width>{});
      for (; output < t.outputs; ++output) columns(t.rows[r], output, Constant<1>{});
    }
    UNROLL
    for (int h = 0; h < Height; ++h) {
      UNROLL
      for (int k = 0; k < Taps; ++k) store_sum<E>(dw + (h * t.row_pitch + k * t.pitch) * sizeof(A), sum[h][k], next - c);
    }
  }
}

// Any taps, step and stride, and any number of channels; one row of taps, a few taps at a time.
template <class E, int Some>
inline void general_grad_taps(const Grad& t, Index c, Index skip, int lanes, bool some, Index tap) {
  using V = typename E::V;
  using A = typename E::Sum;
  const Index pitch = t.pitch * E::size;
  auto load = [&](const char* p) __attribute__((always_inline)) { return some ? E::load_some(p, lanes) : E::load(p); };
  V sum[Some];
  char* dw = t.dw + (tap * t.pitch + c) * sizeof(A);
  UNROLL
  for (int k = 0; k < Some; ++k) {
    char* p = dw + k * t.pitch * sizeof(A);
    sum[k] = some ? Full<A>::load_some(p, lanes) : load_vector<A, E::lanes>(p);
  }
  // Tap k reads inside the input for outputs from[k] <= o < to[k]; all taps do for low <= o < high.
  Index from[Some], to[Some], low = 0, high = t.outputs;
  UNROLL
  for (int k = 0; k < Some; ++k) {
    const Index column = t.column + (tap + k) * t.step;
    from[k] = column < 0 ? (-column + t.stride - 1) / t.stride : 0;
    to[k] = column < t.columns ? (t.columns - column + t.stride - 1) / t.stride : 0;
    if (to[k] > t.outputs) to[k] = t.outputs;
    if (from[k] > to[k]) from[k] = to[k];
    if (from[k] > low) low = from[k];
    if (to[k] < high) high = to[k];
  }
  if (low > high) low = high = 0;
  for (Index r = 0; r < t.count; ++r) {
    if (!t.rows[r].x[0]) continue;
    const char* g = t.rows[r].g + c * E::size;
    const char* x = t.rows[r].x[0] + (t.column + tap * t.step) * pitch + c * E::size;
    UNROLL
    for (int k = 0; k < Some; ++k) {
      const char* xk = x + k * t.step * pitch;
      const bool none = low == high;
      for (Index o = from[k]; o < (none ? to[k] : low); ++o) sum[k] += load(xk + o * t.stride * pitch) * load(g + o * pitch);
      for (Index o = none ? to[k] : high; o < to[k]; ++o) sum[k] += load(xk + o * t.stride * pitch) * load(g + o * pitch);
    }
    for (Index o = low; o < high; ++o) {
      const V v = load(g + o * pitch);
      UNROLL
      for (int k = 0; k < Some; ++k) sum[k] += load(x + (o * t.stride + k * t.step) * pitch) * v;
    }
  }
  UNROLL
  for (int k = 0; k < Some; ++k) {
    char* p = dw + k * t.pitch * sizeof(A);
    if (some) {
      Full<A>::store_some(p, sum[k], lanes);
    } else {
      store_sum<E>(p, sum[k], skip);
    }
  }
}

template <class E>
void general_grad(const Grad& t) {
  for (Index next = t.begin; next < t.end; next += E::lanes) {
    const bool some = t.end - t.begin < E::lanes;
    const int lanes = some ? static_cast<int>(t.end - t.begin) : E::lanes;
    const Index c = some ? next : vector_start(next, t.end, E::lanes);
    Index tap = 0;
    for (; tap + 8 <= t.taps; tap += 8) general_grad_taps<E, 8>(t, c, next - c, lanes, some, tap);
    for (; tap + 4 <= t.taps; tap += 4) general_grad_taps<E, 4>(t, c, next - c, lanes, some, tap);
    for (; tap < t.taps; ++tap) general_grad_taps<E, 1>(t, c, next - c, lanes, some, tap);
  }
}

// The registers hold a tile's sums, the taps and one vector of input: 32 registers, or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILES(E, taps, stride)                                                                      \
  {taps, stride, 14, 1, tile<E, taps, stride, 14, 1>}, {taps, stride, 7, 2, tile<E, taps, stride, 7, 2>}, \
      {taps, stride, 7, 1, tile<E, taps, stride, 7, 1>}, {taps, stride, 3, 2, tile<E, taps, stride, 3, 2>}, \
      {taps, stride, 3, 1, tile<E, taps, stride, 3, 1>}, {taps, stride, 1, 1, tile<E, taps, stride, 1, 1>}
#define WIDE_TILES(E) {kMany, 1, 14, 1, wide_tile<E, 14>}, {kMany, 1, 7, 1, wide_tile<E, 7>}
#define GENERAL_TILES(E)                                                                      \
  {0, 0, 14, 1, general_tile<E, 14>}, {0, 0, 7, 1, general_tile<E, 7>}, {0, 0, 3, 1, general_tile<E, 3>}, \
      {0, 0, 1, 1, general_tile<E, 1>}
#define GRADS(E)                                                                            \
  {3, 3, 1, grad<E, 3, 3, 1, 7>}, {3, 1, 1, grad<E, 3, 1, 1, 7>}, {3, 3, 2, grad<E, 3, 3, 2, 7>}, \
      {3, 1, 2, grad<E, 3, 1, 2, 7>}, {5, 5, 1, grad<E, 5, 5, 1, 4>}, {5, 1, 1, grad<E, 5, 1, 1, 7>}, \
      {5, 5, 2, grad<E, 5, 5, 2, 4>}, {5, 1, 2, grad<E, 5, 1, 2, 7>}, {7, 2, 1, grad<E, 7, 2, 1, 7>}, \
      {7, 1, 1, grad<E, 7, 1, 1, 7>}, {7, 2, 2, grad<E, 7, 2, 2, 7>}, {7, 1, 2, grad<E, 7, 1, 2, 7>}
#else
#define TILES(E, taps, stride)                                                                      \
  {taps, stride, 4, 2, tile<E, taps, stride, 4, 2>}, {taps, stride, 7, 1, tile<E, taps, stride, 7, 1>}, \
      {taps, stride, 4, 1, tile<E, taps, stride, 4, 1>}, {taps, stride, 1, 1, tile<E, taps, stride, 1, 1>}
#define WIDE_TILES(E) {kMany, 1, 7, 1, wide_tile<E, 7>}
#define GENERAL_TILES(E) \
  {0, 0, 7, 1, general_tile<E, 7>}, {0, 0, 3, 1, general_tile<E, 3>}, {0, 0, 1, 1, general_tile<E, 1>}
#define GRADS(E)                                                                            \
  {3, 3, 1, grad<E, 3, 3, 1, 4>}, {3, 1, 1, grad<E, 3, 1, 1, 7>}, {3, 3, 2, grad<E, 3, 3, 2, 4>}, \
      {3, 1, 2, grad<E, 3, 1, 2, 7>}, {5, 2, 1, grad<E, 5, 2, 1, 4>}, {5, 1, 1, grad<E, 5, 1, 1, 7>}, \
      {5, 2, 2, grad<E, 5, 2, 2, 4>}, {5, 1, 2, grad<E, 5, 1, 2, 7>}, {7, 1, 1, grad<E, 7, 1, 1, 7>}, \
      {7, 1, 2, grad<E, 7, 1, 2, 7>}
#endif

template <class E>
struct Tables {
  static constexpr TileShape tiles[] = {
      TILES(E, 2, 1), TILES(E, 3, 1), TILES(E, 4, 1), TILES(E, 5, 1), TILES(E, 7, 1), TILES(E, 3, 2), TILES(E, 5, 2),
      TILES(E, 7, 2), WIDE_TILES(E), GENERAL_TILES(E), {0, 0, 0, 0, nullptr}};
  static constexpr GradShape grads[] = {GRADS(E), {0, 1, 0, general_grad<E>}, {0, 0, 0, nullptr}};
};
// Doubles are for checks of derivatives: the general kernels serve them.
template <>
struct Tables<F64> {
  static constexpr TileShape tiles[] = {GENERAL_TILES(F64), {0, 0, 0, 0, nullptr}};
  static constexpr GradShape grads[] = {{0, 1, 0, general_grad<F64>}, {0, 0, 0, nullptr}};
};

template <class E>
constexpr Kernels kernels_of() {
  return {E::lanes, Tables<E>::tiles, Tables<E>::grads};
}

}  // namespace

namespace depthwise::DEPTHWISE_TARGET {

Kernels kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64: return kernels_of<F64>();
    case Dtype::f16: return kernels_of<F16>();
    case Dtype::bf16: return kernels_of<BF16>();
    default: return kernels_of<F32>();
  }
}

}  // namespace depthwise::DEPTHWISE_TARGET

// The innermost loops. Compiled once per instruction set, into the namespace DEPTHWISE_TARGET.
//
// A tile's loop keeps the tile's sums in registers. For each row of taps and each row of the tile it reads every vector
// of input once, multiplies it by each tap and adds it to all the sums that it reaches. Columns that may lie outside
// the input are tested one by one where they are read. Outside the input nothing is loaded, multiplied or added,
// whatever the taps hold, and the borders of small maps cost nothing.
//
// Channels are innermost. A tile of few columns and many rows reads and writes as many streams of consecutive addresses
// as it has rows, and the processor's prefetchers follow them.
#include "loops.h"

#include "simd.h"
#include "tuning.h"

namespace {

using namespace depthwise;

#define UNROLL _Pragma("GCC unroll 64")

template <class E>
inline typename E::V broadcast(typename E::Sum value) {
  return typename E::V{} + value;
}

template <class E>
inline typename E::V clamp(typename E::V v, Activation activation) {
  // The order of the operands keeps NaNs.
  const auto low = broadcast<E>(0), high = broadcast<E>(6);
  if (activation != Activation::identity) v = v < low ? low : v;
  if (activation == Activation::relu6) v = v > high ? high : v;
  return v;
}

template <class E>
inline void store_or_stream(const Tile& t, char* y, typename E::V v) {
  if constexpr (E::stored_bytes == sizeof(typename E::Sum)) {
    if (t.stream) return E::stream(y, v);
  }
  E::store(y, v);
}

// Stores a tile of sums, `y_offset_bytes` from the first tile.
template <class E, int Height, int Width>
inline void store_tile(const Tile& t, Index y_offset_bytes, typename E::V (&sum)[Height][Width]) {
  if (t.activation != Activation::identity) {
    UNROLL
    for (int h = 0; h < Height; ++h) {
      UNROLL
      for (int j = 0; j < Width; ++j) sum[h][j] = clamp<E>(sum[h][j], t.activation);
    }
  }
  const Index y_pitch_bytes = t.y_pitch * E::stored_bytes;
  UNROLL
  for (int h = 0; h < Height; ++h) {
    char* y = t.y[h] + y_offset_bytes;
    UNROLL
    for (int j = 0; j < Width; ++j) store_or_stream<E>(t, y + j * y_pitch_bytes, sum[h][j]);
  }
}

template <int n>
struct Constant {
  static constexpr int value = n;
};

// The first channel of the vector at c: vectors that would pass the end are moved back over their neighbours.
inline Index vector_start(Index c, Index end, int lanes) { return c + lanes > end ? end - lanes : c; }

// Calls f(column, y_offset_bytes, c) for each tile and each vector of channels: where the tile begins, how far beyond
// the first tile it writes, and the first channel.
template <class E, class F>
__attribute__((always_inline)) inline void for_each_vector(const Tile& t, int width, Index stride, const F& f) {
  for (Index n = 0; n < t.tiles; ++n) {
    const Index column = t.column + n * width * stride, y_offset_bytes = n * width * t.y_pitch * E::stored_bytes;
    for (Index next = t.begin; next < t.end; next += E::lanes)
      f(column, y_offset_bytes, vector_start(next, t.end, E::lanes));
  }
}

// Whether a position `distance` beyond a tap of the first output lies under the same tap of one of `count` outputs.
constexpr bool inside(int distance, int stride, int count) {
  return distance % stride == 0 && distance >= 0 && distance / stride < count;
}

// Whether a row of input that two rows of a tile need is read once for both: two rows of taps must fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kReadOnceForTwoRows = true;
#else
constexpr bool kReadOnceForTwoRows = false;
#endif

// Whether a tile's sums and all taps of a square window fit into the registers.
template <int Taps, int Height>
constexpr bool kSquare = kReadOnceForTwoRows && Taps == 3 && Height >= 2;

// The row of input that lies r rows below the first under the square window of a tile.
template <int Stride, int Height>
inline Index row_under(const TileInput& t, int r) {
  const int h = r / Stride < Height ? r / Stride : Height - 1;
  return t.rows[r - h * Stride].x_bytes[h];
}

// The columns that a tile reads. Only those that reach beyond the first or the last output may be outside the input.
template <int Taps, int Stride, int Width>
struct Columns {
  static constexpr int count = (Width - 1) * Stride + Taps;
  Index first, last;
  Columns(Index column, Index columns)
      : first(column < 0 ? -column : 0), last(columns - column < count ? columns - column : count) {}
  inline bool outside(int i) const { return (i < Taps - 1 && i < first) || (i >= count - (Taps - 1) && i >= last); }
};

// Reads each row of input under a square window once, and calls f(vector, h, j, b, k) for each output (h, j) of the
// tile that it reaches, through tap (b, k). Prefetch: fetches what the next tile to the right reads of those rows into
// a near cache.
template <class E, int Height, bool Prefetch, int Taps, int Stride, int Width, class F>
__attribute__((always_inline)) inline void for_each_in_square(const TileInput& t,
                                                              const Columns<Taps, Stride, Width>& columns,
                                                              const char* x, Index pitch_bytes, const F& f) {
  UNROLL
  for (int r = 0; r < (Height - 1) * Stride + Taps; ++r) {
    const Index x_row_bytes = row_under<Stride, Height>(t, r);
    if (x_row_bytes == kOutside) continue;
    UNROLL
    for (int i = 0; i < columns.count; ++i) {
      if (columns.outside(i)) continue;
      const char* const read = x + x_row_bytes + i * pitch_bytes;
      const typename E::V v = E::load(read);
      if (Prefetch && i >= Taps - Stride) __builtin_prefetch(read + Width * Stride * pitch_bytes, 0, 2);
      UNROLL
      for (int b = 0; b < Taps; ++b) {
        UNROLL
        for (int k = 0; k < Taps; ++k) {
          if (inside(r - b, Stride, Height) && inside(i - k, Stride, Width))
            f(v, (r - b) / Stride, (i - k) / Stride, b, k);
        }
      }
    }
  }
}

// Whether a tile fetches what the next one reads. At stride 1 that gained nothing where the caches hold the input.
template <int Stride>
inline bool prefetches(const Tile& t) {
  return Stride == 2 && t.prefetch;
}

// A tile under a square window whose taps are all in registers.
template <class E, int Taps, int Stride, int Width, int Height>
void square_tile(const Tile& t) {
  using V = typename E::V;
  using A = typename E::Sum;
  const Index pitch_bytes = t.pitch * E::loaded_bytes, tap_pitch_bytes = t.tap_pitch * static_cast<Index>(sizeof(A));
  V w[Taps][Taps], start = V{};
  Index loaded = -1;  // the channel of the taps that are loaded: a single vector keeps them for all tiles
  for_each_vector<E>(t, Width, Stride, [&](Index column, Index y_offset_bytes, Index c) __attribute__((always_inline)) {
    if (c != loaded) {
      const char* const taps = t.w + (t.tap_offset + c) * static_cast<Index>(sizeof(A));
      UNROLL
      for (int b = 0; b < Taps; ++b) {
        UNROLL
        for (int k = 0; k < Taps; ++k)
          w[b][k] = load_vector<A, E::lanes>(taps + t.rows[b].tap_bytes + k * tap_pitch_bytes);
      }
      if (t.bias) start = load_vector<A, E::lanes>(t.bias + c * sizeof(A));
      loaded = c;
    }
    V sum[Height][Width];
    UNROLL
    for (int h = 0; h < Height; ++h) {
      UNROLL
      for (int j = 0; j < Width; ++j) sum[h][j] = start;
    }
    const Columns<Taps, Stride, Width> columns(column, t.columns);
    const char* const x = t.x + column * pitch_bytes + c * E::loaded_bytes;
    auto add = [&](const V& v, int h, int j, int b, int k) __attribute__((always_inline)) { sum[h][j] += v * w[b][k]; };
    if (prefetches<Stride>(t)) {
      for_each_in_square<E, Height, true>(t, columns, x, pitch_bytes, add);
    } else {
      for_each_in_square<E, Height, false>(t, columns, x, pitch_bytes, add);
    }
    store_tile<E>(t, y_offset_bytes + c * E::stored_bytes, sum);
  });
}

template <class E, int Taps, int Stride, int Width, int Height>
void tile(const Tile& t) {
  if constexpr (kSquare<Taps, Height>) {
    if (t.square && t.count == Taps) return square_tile<E, Taps, Stride, Width, Height>(t);
  }
  using V = typename E::V;
  using A = typename E::Sum;
  const Index pitch_bytes = t.pitch * E::loaded_bytes, tap_pitch_bytes = t.tap_pitch * static_cast<Index>(sizeof(A));
  for_each_vector<E>(t, Width, Stride, [&](Index column, Index y_offset_bytes, Index c) __attribute__((always_inline)) {
    const Columns<Taps, Stride, Width> columns(column, t.columns);
    V sum[Height][Width];
    V start = V{};
    if (t.bias) start = load_vector<A, E::lanes>(t.bias + c * sizeof(A));
    UNROLL
    for (int h = 0; h < Height; ++h) {
      UNROLL
      for (int j = 0; j < Width; ++j) sum[h][j] = start;
    }
    const char* const x = t.x + column * pitch_bytes + c * E::loaded_bytes;
    const char* const taps = t.w + (t.tap_offset + c) * static_cast<Index>(sizeof(A));
    auto load_taps = [&](const TapRow* row, V(&w)[Taps]) __attribute__((always_inline)) {
      UNROLL
      for (int k = 0; k < Taps; ++k) w[k] = load_vector<A, E::lanes>(taps + row->tap_bytes + k * tap_pitch_bytes);
    };
    // Adds a row of input to the tile's rows h, times the taps of each.
    auto add = [&](Index x_row_bytes, auto... rows) __attribute__((always_inline)) {
      const char* const read = x + x_row_bytes;
      UNROLL
      for (int i = 0; i < columns.count; ++i) {
        if (columns.outside(i)) continue;
        const V v = E::load(read + i * pitch_bytes);
        UNROLL
        for (int k = 0; k < Taps; ++k) {
          if (inside(i - k, Stride, Width)) ((sum[rows.h][(i - k) / Stride] += v * rows.w[k]), ...);
        }
      }
    };
    // Fetches what the next tile to the right reads of a row; those above the last were read for the tiles above.
    auto fetch = [&](const TapRow* row) __attribute__((always_inline)) {
      if (!prefetches<Stride>(t) || row->x_bytes[Height - 1] == kOutside) return;
      UNROLL
      for (int i = Taps - Stride; i < columns.count; ++i) {
        __builtin_prefetch(x + row->x_bytes[Height - 1] + (i + Width * Stride) * pitch_bytes, 0, 2);
      }
    };
    struct To {
      int h;
      const V* w;
    };
    if constexpr (Height == 2 && kReadOnceForTwoRows) {
      // The next row of taps mostly reads for the tile's first row what this row reads for its second: read once for
      // both.
      V w[2][Taps] = {};  // a row of taps, and the one before
      Index second = kOutside;
      const TapRow* row = t.rows;
      for (Index r = 0; r < t.count; ++r, ++row) {
        fetch(row);
        UNROLL
        for (int k = 0; k < Taps; ++k) w[1][k] = w[0][k];
        load_taps(row, w[0]);
        if (second != kOutside && second == row->x_bytes[0]) {
          add(second, To{0, w[0]}, To{1, w[1]});
        } else {
          if (row->x_bytes[0] != kOutside) add(row->x_bytes[0], To{0, w[0]});
          if (second != kOutside) add(second, To{1, w[1]});
        }
        second = row->x_bytes[1];
      }
      if (second != kOutside) add(second, To{1, w[0]});
    } else {
      for (const TapRow *row = t.rows, *end = row + t.count; row != end; ++row) {
        fetch(row);
        V w[Taps];
        load_taps(row, w);
        UNROLL
        for (int h = 0; h < Height; ++h) {
          if (row->x_bytes[h] != kOutside) add(row->x_bytes[h], To{h, w});
        }
      }
    }
    store_tile<E>(t, y_offset_bytes + c * E::stored_bytes, sum);
  });
}

// Many taps side by side at stride one: eight at a time, then what is left, into the same sums. Any column may be
// outside.
template <class E, int Width>
void wide_tile(const Tile& t) {
  using V = typename E::V;
  using A = typename E::Sum;
  const Index pitch_bytes = t.pitch * E::loaded_bytes, tap_pitch_bytes = t.tap_pitch * static_cast<Index>(sizeof(A));
  for_each_vector<E>(
      t, Width, 1, [&](Index first_column, Index y_offset_bytes, Index c) __attribute__((always_inline)) {
        V sum[1][Width];
        V start = V{};
        if (t.bias) start = load_vector<A, E::lanes>(t.bias + c * sizeof(A));
        UNROLL
        for (int j = 0; j < Width; ++j) sum[0][j] = start;
        auto add = [&](const TapRow& row, Index tap, auto taps) __attribute__((always_inline)) {
          constexpr int kTaps = decltype(taps)::value, kColumns = Width - 1 + kTaps;
          const Index column = first_column + tap;
          const Index first = column < 0 ? -column : 0;
          const Index last = t.columns - column < kColumns ? t.columns - column : kColumns;
          if (first >= last) return;
          const char* taps_of_row = t.w + row.tap_bytes + (t.tap_offset + c) * static_cast<Index>(sizeof(A));
          V w[kTaps];
          UNROLL
          for (int k = 0; k < kTaps; ++k) w[k] = load_vector<A, E::lanes>(taps_of_row + (tap + k) * tap_pitch_bytes);
          const char* x = t.x + row.x_bytes[0] + column * pitch_bytes + c * E::loaded_bytes;
          UNROLL
          for (int i = 0; i < kColumns; ++i) {
            if (i < first || i >= last) continue;
            const V v = E::load(x + i * pitch_bytes);
            UNROLL
            for (int k = 0; k < kTaps; ++k) {
              if (i >= k && i - k < Width) sum[0][i - k] += v * w[k];
            }
          }
        };
        for (Index r = 0; r < t.count; ++r) {
          if (t.rows[r].x_bytes[0] == kOutside) continue;
          Index tap = 0;
          for (; tap + 8 <= t.taps; tap += 8) add(t.rows[r], tap, Constant<8>{});
          switch (t.taps - tap) {
            case 1: add(t.rows[r], tap, Constant<1>{}); break;
            case 2: add(t.rows[r], tap, Constant<2>{}); break;
            case 3: add(t.rows[r], tap, Constant<3>{}); break;
            case 4: add(t.rows[r], tap, Constant<4>{}); break;
            case 5: add(t.rows[r], tap, Constant<5>{}); break;
            case 6: add(t.rows[r], tap, Constant<6>{}); break;
            case 7: add(t.rows[r], tap, Constant<7>{}); break;
          }
        }
        store_tile<E>(t, y_offset_bytes + c * E::stored_bytes, sum);
      });
}

// Any taps, step and stride, and any number of channels: each tap takes the tile's row of input at its own offset.
template <class E, int Width>
void general_tile(const Tile& t) {
  using V = typename E::V;
  using A = typename E::Sum;
  const Index pitch_bytes = t.pitch * E::stored_bytes;
  const bool partial = t.end - t.begin < E::lanes;
  const int lanes = partial ? static_cast<int>(t.end - t.begin) : E::lanes;
  for_each_vector<E>(
      t, Width, t.stride, [&](Index first_column, Index y_offset_bytes, Index vector) __attribute__((always_inline)) {
        const Index c = partial ? t.begin : vector;
        auto sums_at = [&](const char* p) __attribute__((always_inline)) {
          return partial ? Full<A>::load_partial(p, lanes) : load_vector<A, E::lanes>(p);
        };
        V start = V{};
        if (t.bias) start = sums_at(t.bias + c * sizeof(A));
        V sum[Width];
        UNROLL
        for (int j = 0; j < Width; ++j) sum[j] = start;
        for (Index r = 0; r < t.count; ++r) {
          if (t.rows[r].x_bytes[0] == kOutside) continue;
          const char* row = t.x + t.rows[r].x_bytes[0] + c * E::stored_bytes;
          const char* taps = t.w + t.rows[r].tap_bytes + (t.tap_offset + c) * static_cast<Index>(sizeof(A));
          for (Index k = 0; k < t.taps; ++k) {
            const Index column = first_column + k * t.step;
            const V w = sums_at(taps + k * t.tap_pitch * static_cast<Index>(sizeof(A)));
            if (!partial && column >= 0 && column + (Width - 1) * t.stride < t.columns) {
              const char* x = row + column * pitch_bytes;
              // A single output has no stride: the product might overflow.
              const Index jump = Width > 1 ? t.stride * pitch_bytes : 0;
              UNROLL
              for (int j = 0; j < Width; ++j) sum[j] += E::load(x + j * jump) * w;
            } else {
              // The outputs whose column is inside: from <= j < to.
              const Index from = column < 0 ? (-column + t.stride - 1) / t.stride : 0;
              const Index to = column < t.columns ? (t.columns - column + t.stride - 1) / t.stride : 0;
              UNROLL
              for (int j = 0; j < Width; ++j) {
                if (j < from || j >= to) continue;
                const char* p = row + (column + j * t.stride) * pitch_bytes;
                sum[j] += (partial ? E::load_partial(p, lanes) : E::load(p)) * w;
              }
            }
          }
        }
        UNROLL
        for (int j = 0; j < Width; ++j) {
          char* y = t.y[0] + y_offset_bytes + (j * t.y_pitch + c) * E::stored_bytes;
          const V v = clamp<E>(sum[j], t.activation);
          if (partial) {
            E::store_partial(y, v, lanes);
          } else {
            store_or_stream<E>(t, y, v);
          }
        }
      });
}

// Stores the lanes from `skip` on: the vector before has stored the others.
template <class E>
inline void store_sum(char* p, typename E::V v, Index skip) {
  using A = typename E::Sum;
  if (skip == 0) {
    store_vector<A, E::lanes>(p, v);
  } else {
    alignas(64) char buffer[kVectorBytes];
    store_vector<A, E::lanes>(buffer, v);
    std::memcpy(p + skip * sizeof(A), buffer + skip * sizeof(A), kVectorBytes - skip * sizeof(A));
  }
}

// A tile of the cotangent stays in registers while the rows of taps and of x under it pass by.
template <class E, int Taps, int Stride, int Width, int Height>
void grad_tile(const GradTile& t) {
  using V = typename E::V;
  using A = typename E::Sum;
  const Columns<Taps, Stride, Width> columns(t.column, t.columns);
  const Index pitch_bytes = t.pitch * E::stored_bytes, g_pitch_bytes = t.g_pitch * E::stored_bytes;
  const Index tap_pitch_bytes = t.tap_pitch * static_cast<Index>(sizeof(A));
  for (Index next = t.begin; next < t.end; next += E::lanes) {
    const Index c = vector_start(next, t.end, E::lanes);
    V g[Height][Width];
    UNROLL
    for (int h = 0; h < Height; ++h) {
      UNROLL
      for (int j = 0; j < Width; ++j) g[h][j] = E::load(t.g[h] + j * g_pitch_bytes + c * E::stored_bytes);
    }
    const char* const x = t.x + t.column * pitch_bytes + c * E::stored_bytes;
    auto taps = [&](const TapRow* row) { return t.dw + row->tap_bytes + c * static_cast<Index>(sizeof(A)); };
    auto load_sums = [&](const TapRow* row, V(&sum)[Taps]) __attribute__((always_inline)) {
      UNROLL
      for (int k = 0; k < Taps; ++k) sum[k] = load_vector<A, E::lanes>(taps(row) + k * tap_pitch_bytes);
    };
    auto store_sums = [&](const TapRow* row, const V(&sum)[Taps]) __attribute__((always_inline)) {
      UNROLL
      for (int k = 0; k < Taps; ++k) store_sum<E>(taps(row) + k * tap_pitch_bytes, sum[k], next - c);
    };
    if constexpr (kSquare<Taps, Height>) {
      if (t.square && t.count == Taps) {
        V sum[Taps][Taps];
        UNROLL
        for (int b = 0; b < Taps; ++b) load_sums(t.rows + b, sum[b]);
        auto add = [&](const V& v, int h, int j, int b, int k)
                       __attribute__((always_inline)) { sum[b][k] += v * g[h][j]; };
        // The caches rarely hold both arrays, and the next tile's part of each is fetched ahead.
        UNROLL
        for (int h = 0; h < Height; ++h) {
          UNROLL
          for (int j = 0; j < Width; ++j)
            __builtin_prefetch(t.g[h] + (Width + j) * g_pitch_bytes + c * E::stored_bytes, 0, 2);
        }
        for_each_in_square<E, Height, true>(t, columns, x, pitch_bytes, add);
        UNROLL
        for (int b = 0; b < Taps; ++b) store_sums(t.rows + b, sum[b]);
        continue;
      }
    }
    for (const TapRow *row = t.rows, *end = row + t.count; row != end; ++row) {
      V sum[Taps];
      load_sums(row, sum);
      UNROLL
      for (int h = 0; h < Height; ++h) {
        if (row->x_bytes[h] == kOutside) continue;
        const char* const read = x + row->x_bytes[h];
        UNROLL
        for (int i = 0; i < columns.count; ++i) {
          if (columns.outside(i)) continue;
          const V v = E::load(read + i * pitch_bytes);
          UNROLL
          for (int k = 0; k < Taps; ++k) {
            if (inside(i - k, Stride, Width)) sum[k] += v * g[h][(i - k) / Stride];
          }
        }
      }
      store_sums(row, sum);
    }
  }
}

// Any taps, step and stride, and any number of channels; one row of taps, a few taps at a time.
template <class E, int Taps>
inline void general_grad_taps(const GradRows& t, Index c, Index skip, int lanes, bool partial, Index tap) {
  using V = typename E::V;
  using A = typename E::Sum;
  const Index pitch_bytes = t.pitch * E::stored_bytes;
  auto load = [&](const char* p)
                  __attribute__((always_inline)) { return partial ? E::load_partial(p, lanes) : E::load(p); };
  V sum[Taps];
  char* dw = t.dw + (tap * t.tap_pitch + c) * sizeof(A);
  UNROLL
  for (int k = 0; k < Taps; ++k) {
    char* p = dw + k * t.tap_pitch * sizeof(A);
    sum[k] = partial ? Full<A>::load_partial(p, lanes) : load_vector<A, E::lanes>(p);
  }
  // Tap k reads inside the input for outputs from[k] <= o < to[k]; all taps do for low <= o < high.
  Index from[Taps], to[Taps], low = 0, high = t.outputs;
  UNROLL
  for (int k = 0; k < Taps; ++k) {
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
    const char* g = t.rows[r].g + c * E::stored_bytes;
    // The position that tap k reads for output o, inside the input. Outside, the product might overflow.
    auto x = [&](int k, Index o) __attribute__((always_inline)) {
      return t.rows[r].x + (t.column + (tap + k) * t.step + o * t.stride) * pitch_bytes + c * E::stored_bytes;
    };
    UNROLL
    for (int k = 0; k < Taps; ++k) {
      const bool none = low == high;
      for (Index o = from[k]; o < (none ? to[k] : low); ++o) sum[k] += load(x(k, o)) * load(g + o * pitch_bytes);
      for (Index o = none ? to[k] : high; o < to[k]; ++o) sum[k] += load(x(k, o)) * load(g + o * pitch_bytes);
    }
    for (Index o = low; o < high; ++o) {
      const V v = load(g + o * pitch_bytes);
      UNROLL
      for (int k = 0; k < Taps; ++k) sum[k] += load(x(k, o)) * v;
    }
  }
  UNROLL
  for (int k = 0; k < Taps; ++k) {
    char* p = dw + k * t.tap_pitch * sizeof(A);
    if (partial) {
      Full<A>::store_partial(p, sum[k], lanes);
    } else {
      store_sum<E>(p, sum[k], skip);
    }
  }
}

template <class E>
void general_grad(const GradRows& t) {
  for (Index next = t.begin; next < t.end; next += E::lanes) {
    const bool partial = t.end - t.begin < E::lanes;
    const int lanes = partial ? static_cast<int>(t.end - t.begin) : E::lanes;
    const Index c = partial ? next : vector_start(next, t.end, E::lanes);
    Index tap = 0;
    for (; tap + 8 <= t.taps; tap += 8) general_grad_taps<E, 8>(t, c, next - c, lanes, partial, tap);
    for (; tap + 4 <= t.taps; tap += 4) general_grad_taps<E, 4>(t, c, next - c, lanes, partial, tap);
    for (; tap < t.taps; ++tap) general_grad_taps<E, 1>(t, c, next - c, lanes, partial, tap);
  }
}

// Packed maps: rows of any number of channels. The last vector of a row may be a part of one.
template <class E>
inline typename E::V load_lanes(const char* p, int lanes) {
  return lanes < E::lanes ? E::load_partial(p, lanes) : E::load(p);
}
template <class E>
inline void store_lanes(char* p, typename E::V v, int lanes) {
  lanes < E::lanes ? E::store_partial(p, v, lanes) : E::store(p, v);
}

// Calls f(channel, lanes) for each vector of a row.
template <class E, class F>
inline void for_each_vector(Index channels, const F& f) {
  Index c = 0;
  for (; c + E::lanes <= channels; c += E::lanes) f(c, E::lanes);
  if (c < channels) f(c, static_cast<int>(channels - c));
}

// Of a known number of pairs, which stay in registers, or of any: then Count is 0.
template <class E, int Count>
void row_sum_of(const RowSum& t) {
  RowPair local[Count ? Count : 1];
  for (int i = 0; i < Count; ++i) local[i] = t.pairs[i];
  for_each_vector<E>(t.channels, [&](Index c, int lanes) __attribute__((always_inline)) {
    const Index offset = c * E::stored_bytes;
    auto sum = typename E::V{};
    auto add = [&](const RowPair& pair) __attribute__((always_inline)) {
      sum += load_lanes<E>(pair.row + offset, lanes) * load_lanes<E>(pair.weights + offset, lanes);
    };
    if constexpr (Count) {
      UNROLL
      for (int i = 0; i < Count; ++i) add(local[i]);
    } else {
      for (Index i = 0; i < t.count; ++i) add(t.pairs[i]);
    }
    store_lanes<E>(t.to + offset, sum, lanes);
  });
}

// Most outputs of most sequence models sum four taps.
template <class E>
void row_sum(const RowSum& t) {
  t.count == 4 ? row_sum_of<E, 4>(t) : row_sum_of<E, 0>(t);
}

template <class E, int Positions>
void row_products_of(const RowProducts& t) {
  using A = typename E::Sum;
  for_each_vector<E>(t.channels, [&](Index c, int lanes) __attribute__((always_inline)) {
    const Index offset = c * E::stored_bytes;
    typename E::V g[Positions];
    UNROLL
    for (int p = 0; p < Positions; ++p) g[p] = load_lanes<E>(t.g + p * t.pitch + offset, lanes);
    for (Index i = 0; i < t.count; ++i) {
      char* const sums = t.targets[i].sums + c * sizeof(A);
      auto sum = load_lanes<Full<A>>(sums, lanes);
      UNROLL
      for (int p = 0; p < Positions; ++p) {
        sum += load_lanes<E>(t.targets[i].row + p * t.pitch + offset, lanes) * g[p];
      }
      store_lanes<Full<A>>(sums, sum, lanes);
    }
  });
}

template <class E>
void row_products(const RowProducts& t) {
  t.positions == 1 ? row_products_of<E, 1>(t) : row_products_of<E, kPackedPositions>(t);
}

// The registers (32, or 16) hold a tile's sums, a row of taps and one vector of input. Windows of few taps do few
// multiplications per value read, so reading in few streams of consecutive addresses matters most. Windows of many taps
// reuse more in wide tiles, and narrow floats are converted less often there.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTall = 7;
#define WIDE(loop) SHAPE(loop, 7, 2)
#define ROWS(loop) SHAPE(loop, 14, 1), SHAPE(loop, 7, 1), SHAPE(loop, 3, 1), SHAPE(loop, 1, 1)
#else
constexpr int kTall = 4;
#define WIDE(loop) SHAPE(loop, 4, 2)
#define ROWS(loop) SHAPE(loop, 7, 1), SHAPE(loop, 3, 1), SHAPE(loop, 1, 1)
#endif
#define TALL(loop) SHAPE(loop, 2, kTall)
#define NARROW(loop, height) SHAPE(loop, 1, height)
#define SHAPE(loop, width, height) shape(width, height, loop<E, Taps, Stride, width, height>)

static_assert(kTall <= kMostRows && kVectorBytes <= kCacheLineBytes);

template <class Work>
constexpr TileShape<Work> shape(int width, int height, Loop<Work> loop) {
  return {width, height, loop};
}

template <class E, int Taps, int Stride>
struct Shapes {
  static constexpr bool full = E::stored_bytes == sizeof(typename E::Sum), few = Taps < 5, upright = few && full;
  static constexpr TileShape<Tile> tiles[] = {upright ? TALL(tile) : WIDE(tile),
                                              upright ? WIDE(tile) : TALL(tile),
                                              NARROW(tile, kTall),
                                              SHAPE(tile, 2, 2),
                                              ROWS(tile),
                                              {}};
  // Tiles of the kernel gradient must not overlap: the list goes down to the width 1 in each height, and in single
  // rows. Four rows at stride 2 read about as many rows of x as seven do at stride 1.
  static constexpr bool tall = few && (full || kSquare<Taps, kTall>);
  static constexpr int rows = Stride == 1 ? kTall : 4;
  static constexpr TileShape<GradTile> grads[] = {tall ? SHAPE(grad_tile, 2, rows) : WIDE(grad_tile),
                                                  tall ? NARROW(grad_tile, rows) : SHAPE(grad_tile, 2, 2),
                                                  tall ? TALL(grad_tile) : NARROW(grad_tile, 2),
                                                  NARROW(grad_tile, tall ? kTall : 2),
                                                  SHAPE(grad_tile, 7, 1),
                                                  SHAPE(grad_tile, 1, 1),
                                                  {}};
};

// The properties of a list of shapes on which callers rely: no tile exceeds the bounds, and the last is one output.
template <class Work, int count>
constexpr bool ends_with_one(const TileShape<Work> (&shapes)[count]) {
  for (int i = 0; i + 1 < count; ++i) {
    if (shapes[i].height > kMostRows || shapes[i].width > kMostColumns) return false;
  }
  return shapes[count - 2].width == 1 && shapes[count - 2].height == 1;
}

// If tiles may not overlap, each height also has a width of 1, as its last.
template <int count>
constexpr bool covers_exactly(const TileShape<GradTile> (&shapes)[count]) {
  for (int i = 0; i + 1 < count; ++i) {
    int narrowest = 0;
    for (int j = i; j + 1 < count; ++j) {
      if (shapes[j].height == shapes[i].height) narrowest = shapes[j].width;
    }
    if (narrowest != 1) return false;
  }
  return ends_with_one(shapes);
}

// The wide and the general loops read only the first row of a TapRow.
template <int count>
constexpr bool single_rows(const TileShape<Tile> (&shapes)[count]) {
  for (int i = 0; i + 1 < count; ++i) {
    if (shapes[i].height != 1) return false;
  }
  return ends_with_one(shapes);
}

template <class E, int Taps, int Stride>
constexpr WindowShapes<Tile> tiles_of() {
  static_assert(ends_with_one(Shapes<E, Taps, Stride>::tiles));
  return {Taps, Stride, Shapes<E, Taps, Stride>::tiles};
}
template <class E, int Taps, int Stride>
constexpr WindowShapes<GradTile> grads_of() {
  static_assert(covers_exactly(Shapes<E, Taps, Stride>::grads));
  return {Taps, Stride, Shapes<E, Taps, Stride>::grads};
}

constexpr TileShape<Tile> kNoShapes[] = {{}};
constexpr WindowShapes<Tile> kNoWindows[] = {{}};
constexpr WindowShapes<GradTile> kNoGrads[] = {{}};

// The windows with their own loops.
template <class E>
struct Windows {
  static constexpr WindowShapes<Tile> tiles[] = {
      tiles_of<E, 1, 1>(), tiles_of<E, 2, 1>(), tiles_of<E, 3, 1>(), tiles_of<E, 3, 2>(), tiles_of<E, 4, 1>(),
      tiles_of<E, 5, 1>(), tiles_of<E, 5, 2>(), tiles_of<E, 7, 1>(), tiles_of<E, 7, 2>(), {}};
  static constexpr WindowShapes<GradTile> grads[] = {
      grads_of<E, 3, 1>(), grads_of<E, 3, 2>(), grads_of<E, 4, 1>(), grads_of<E, 5, 1>(),
      grads_of<E, 5, 2>(), grads_of<E, 7, 1>(), grads_of<E, 7, 2>(), {}};
};
// Staged narrow floats: only windows of many taps at stride 1 are converted ahead.
template <class E>
struct StagedWindows {
  static constexpr WindowShapes<Tile> tiles[] = {tiles_of<E, 5, 1>(), tiles_of<E, 7, 1>(), {}};
};

template <class E>
struct AnyWindow {
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr TileShape<Tile> wide[] = {
      {14, 1, wide_tile<E, 14>}, {7, 1, wide_tile<E, 7>}, {1, 1, wide_tile<E, 1>}, {}};
  static constexpr TileShape<Tile> general[] = {{14, 1, general_tile<E, 14>},
                                                {7, 1, general_tile<E, 7>},
                                                {3, 1, general_tile<E, 3>},
                                                {1, 1, general_tile<E, 1>},
                                                {}};
#else
  static constexpr TileShape<Tile> wide[] = {{7, 1, wide_tile<E, 7>}, {1, 1, wide_tile<E, 1>}, {}};
  static constexpr TileShape<Tile> general[] = {
      {7, 1, general_tile<E, 7>}, {3, 1, general_tile<E, 3>}, {1, 1, general_tile<E, 1>}, {}};
#endif
};

template <class E>
void stage(const char* from, Index pitch_bytes, char* to, Index columns, Index channels) {
  constexpr Index kSum = sizeof(typename E::Sum);
  for (Index i = 0; i < columns; ++i, from += pitch_bytes, to += channels * kSum) {
    for (Index next = 0; next < channels; next += E::lanes) {
      const Index c = vector_start(next, channels, E::lanes);
      store_vector<typename E::Sum, E::lanes>(to + c * kSum, E::load(from + c * E::stored_bytes));
    }
  }
}

template <class E>
void widen(const char* from, char* to, Index count) {
  using A = typename E::Sum;
  Index i = 0;
  for (; i + E::lanes <= count; i += E::lanes)
    store_vector<A, E::lanes>(to + i * sizeof(A), E::load(from + i * E::stored_bytes));
  const int rest = static_cast<int>(count - i);
  if (rest) Full<A>::store_partial(to + i * sizeof(A), E::load_partial(from + i * E::stored_bytes, rest), rest);
}

template <class E>
void narrow(const char* from, char* to, Index count) {
  using A = typename E::Sum;
  Index i = 0;
  for (; i + E::lanes <= count; i += E::lanes)
    E::store(to + i * E::stored_bytes, load_vector<A, E::lanes>(from + i * sizeof(A)));
  const int rest = static_cast<int>(count - i);
  if (rest) E::store_partial(to + i * E::stored_bytes, Full<A>::load_partial(from + i * sizeof(A), rest), rest);
}

constexpr TileLoops kNoTiles = {kNoWindows, kNoShapes};

// Only the general loops.
template <class E>
constexpr Loops general_of() {
  static_assert(single_rows(AnyWindow<E>::general));
  Loops loops = {E::lanes,   kNoTiles,        kNoTiles, nullptr, AnyWindow<E>::general, kNoGrads, general_grad<E>,
                 row_sum<E>, row_products<E>, nullptr,  nullptr};
  if constexpr (E::stored_bytes < static_cast<int>(sizeof(typename E::Sum))) {
    loops.widen = widen<E>;
    loops.narrow = narrow<E>;
  }
  return loops;
}

template <class E>
constexpr Loops loops_of() {
  Loops loops = general_of<E>();
  loops.grads = Windows<E>::grads;
  loops.stage = stage<E>;
  if constexpr (E::stored_bytes == sizeof(typename E::Sum)) {
    static_assert(single_rows(AnyWindow<E>::wide));
    loops.direct = loops.staged = {Windows<E>::tiles, AnyWindow<E>::wide};
  } else {
    static_assert(single_rows(AnyWindow<Staged<E>>::wide));
    loops.direct = {Windows<E>::tiles, kNoShapes};
    loops.staged = {StagedWindows<Staged<E>>::tiles, AnyWindow<Staged<E>>::wide};
  }
  return loops;
}

}  // namespace

namespace depthwise::DEPTHWISE_TARGET {

Loops loops(Dtype dtype) {
  switch (dtype) {
    // Doubles serve checks of derivatives; the general loops are enough.
    case Dtype::f64: return general_of<F64>();
#if defined(__AVX2__) || defined(__aarch64__)
    case Dtype::f16: return loops_of<F16>();
#else  // without an instruction for it, converting takes all the time
    case Dtype::f16: return general_of<F16>();
#endif
    case Dtype::bf16: return loops_of<BF16>();
    default: return loops_of<F32>();
  }
}

}  // namespace depthwise::DEPTHWISE_TARGET

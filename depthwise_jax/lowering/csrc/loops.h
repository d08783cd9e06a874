// The innermost loops, which loops.cc provides once for each instruction set. A loop computes one tile of outputs, or
// what one tile of the cotangent adds to the kernel gradient, for a range of channels.
//
// Names that end in _bytes are sizes or offsets in bytes; a pitch, an offset or a count without it is in elements.
#pragma once

#include <limits>

#include "depthwise.h"

namespace depthwise {

// The rows of the highest tile and the columns of the widest.
constexpr int kMostRows = 7, kMostColumns = 14;

// A row of taps, relative to the taps' first byte, and the row of input under it for each of a tile's rows, relative to
// the input's. kOutside: that row is outside the input.
struct TapRow {
  Index tap_bytes;
  Index x_bytes[kMostRows];
};
constexpr Index kOutside = std::numeric_limits<Index>::min();

// The part of x that a tile reads, and its taps. Position j of the tile reads column `column` + j*stride + t*step
// through tap t if 0 <= that < columns.
struct TileInput {
  const TapRow* rows;
  Index count;  // of `rows`
  // Row b of the taps reads b rows below the first for the tile's first row, and `stride` more for each next.
  bool square;
  const char* x;
  Index column, columns;
  Index tap_pitch;   // from tap to tap
  Index pitch;       // from column to column of x: the channels
  Index begin, end;  // channels
};

// Tiles of outputs side by side, each of some consecutive ones along the last spatial axis, in some rows.
struct Tile : TileInput {
  Index tiles;
  const char* w;
  Index taps, step, stride;  // constants of all loops but the wide and the general ones
  Index tap_offset;          // from the beginning of a row of taps to the first
  char* y[kMostRows];        // the first output of each row
  Index y_pitch;             // from output to output
  const char* bias;          // may be null
  Activation activation;
  bool stream;    // store past the caches; y is aligned to whole vectors
  bool prefetch;  // fetch what the next tile reads
};

// One tile of the cotangent, which is added to the kernel gradient in `dw`.
struct GradTile : TileInput {
  char* dw;
  const char* g[kMostRows];  // the first position of each row
  Index g_pitch;             // from position to position
};

// Rows of the cotangent with the rows of x that one row of taps reads for them, which are added to that row's gradient.
struct GradRow {
  const char *g, *x;
};
struct GradRows {
  const GradRow* rows;
  Index count;  // of `rows`
  Index column, columns, outputs;
  Index taps, step, stride;
  Index pitch, tap_pitch;  // of g and x, of dw
  char* dw;
  Index begin, end;  // channels
};

template <class Work>
using Loop = void (*)(const Work&);

// One row of a packed map's result: the sum of products of rows of `channels` elements.
struct RowPair {
  const char *row, *weights;
};
struct RowSum {
  const RowPair* pairs;
  Index count;  // of `pairs`
  char* to;
  Index channels;
};

// The products of one row of the cotangent with rows of x, each of which is added to a row of sums.
struct RowTarget {
  const char* row;
  char* sums;
};
struct RowProducts {
  const char* g;
  const RowTarget* targets;
  Index count;  // of `targets`
  Index channels;
  // Rows of g side by side, 1 or kPackedPositions, and the bytes from one to the next; each target's rows are arranged
  // alike.
  Index positions, pitch;
};

// A tile's size, in outputs of x or in positions of the cotangent, and the loop that computes it.
template <class Work>
struct TileShape {
  int width, height;
  Loop<Work> loop;
};

// The shapes for `taps` taps side by side at this stride.
template <class Work>
struct WindowShapes {
  Index taps, stride;
  const TileShape<Work>* shapes;
};

// The shapes that a list has for a window, or null. A list of windows ends with one without shapes.
template <class Work>
const TileShape<Work>* find_shapes(const WindowShapes<Work>* list, Index taps, Index stride) {
  for (; list->shapes; ++list) {
    if (list->taps == taps && list->stride == stride) return list->shapes;
  }
  return nullptr;
}

// A list of shapes begins with the best one at equal cost and ends with one without a loop.
struct TileLoops {
  // For certain windows of taps side by side (step 1), for at least `lanes` channels. They test only those columns that
  // reach beyond the first or the last output.
  const WindowShapes<Tile>* specialized;
  const TileShape<Tile>* wide;  // any number of taps side by side, stride 1, at least `lanes` channels
};

// The loops of one instruction set for one dtype.
struct Loops {
  int lanes;  // of a vector of sums
  TileLoops direct;
  // For an input that `stage` has packed in the type of the sums; empty where `stage` is null.
  TileLoops staged;
  // Packs `columns` columns, `pitch_bytes` apart, of `channels` channels (at least `lanes`), and converts them.
  void (*stage)(const char* from, Index pitch_bytes, char* to, Index columns, Index channels);
  const TileShape<Tile>* general;  // any taps, step and stride, any number of channels
  // The kernel gradient: like `specialized`, and the general loop.
  const WindowShapes<GradTile>* grads;
  Loop<GradRows> general_grad;
  // Packed maps; any number of channels.
  Loop<RowSum> row_sum;
  Loop<RowProducts> row_products;
  // Convert `count` consecutive elements of a narrow float to the type of the sums and back; null for other types.
  void (*widen)(const char* from, char* to, Index count);
  void (*narrow)(const char* from, char* to, Index count);
};

#if defined(DEPTHWISE_HARNESS)
// The harness counts which loops run.
void count_run(const void* loop);
#endif

template <class Work>
void run_loop(Loop<Work> loop, const Work& work) {
#if defined(DEPTHWISE_HARNESS)
  count_run(reinterpret_cast<const void*>(loop));
#endif
  loop(work);
}

namespace avx512 {
Loops loops(Dtype);
}
namespace avx2 {
Loops loops(Dtype);
}
namespace baseline {
Loops loops(Dtype);
}
namespace neon {
Loops loops(Dtype);
}

}  // namespace depthwise

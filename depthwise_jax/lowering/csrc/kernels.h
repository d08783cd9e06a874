// The innermost loops, which every instruction set provides once (kernels.cc): one tile of outputs, or what a tile of the
// cotangent adds to the kernel gradient, for a range of channels.
#pragma once

#include <limits>

#include "depthwise.h"

namespace depthwise {

constexpr int kMostRows = 7;

// A row of taps, in bytes from Tile::w, and the row of input under it for each of a tile's rows, in bytes from Tile::x.
struct TapRow {
  Index taps;
  Index x[kMostRows];
};
constexpr Index kOutside = std::numeric_limits<Index>::min();

// Tiles of outputs side by side, each of some consecutive ones along the last spatial axis, in some rows. Output j of the
// first reads column `column` + j*stride + t*step through tap t, if 0 <= that < columns.
struct Tile {
  const TapRow* rows;
  Index count;
  Index tiles;  // the kernel gradient takes one at a time
  bool square;  // row b of the taps reads b rows below the first for the tile's first row, and `stride` more for each next
  const char* x;
  char* w;
  Index column, columns;
  Index taps, step, stride;  // constants of all kernels but the general ones
  Index tap_offset;          // elements from the beginning of a row of taps to the first
  Index tap_pitch;           // elements from tap to tap
  Index pitch;               // elements from column to column of the input: the channels
  char* y[kMostRows];        // the first output of each row; for the kernel gradient the cotangent
  Index y_pitch;             // elements from output to output
  Index begin, end;          // channels
  const char* bias;          // null: none
  Activation activation;
  bool stream;               // store past the caches; addresses are aligned to the vectors
  bool ahead;                // fetch what the next tile reads; the kernel gradient always does
};
using TileKernel = void (*)(const Tile&);

struct TileShape {
  int width, height;
  TileKernel kernel;
};

// The shapes of tiles for so many taps side by side and this stride.
struct WindowTiles {
  Index taps, stride;
  const TileShape* shapes;
};

// The kernel gradient of `count` rows of g, added to dw, for any one row of taps.
struct GradRow {
  const char *g, *x;
};
struct Grad {
  const GradRow* rows;
  Index count;
  Index column, columns, outputs;
  Index taps, step, stride;
  Index pitch, tap_pitch;
  char* dw;
  Index begin, end;
};

// Lists of shapes end with a null kernel and begin with what is best at equal cost; lists of windows end with null shapes.
struct TileKernels {
  // For certain windows of taps side by side (step 1), for at least `lanes` channels. They test only those columns that reach
  // beyond the first or the last output.
  const WindowTiles* certain;
  const TileShape* wide;  // any number of taps side by side, stride 1, at least `lanes` channels
};

// The shapes that a list has for a window; null if it has none.
inline const TileShape* find_tiles(const WindowTiles* list, Index taps, Index stride) {
  for (; list->shapes; ++list) {
    if (list->taps == taps && list->stride == stride) return list->shapes;
  }
  return nullptr;
}

// What one instruction set has for one dtype.
struct Kernels {
  int lanes;
  TileKernels direct;
  // Of an input that `stage` has packed in the type of the sums; without kernels where `stage` is null.
  TileKernels staged;
  // Packs `columns` columns, `pitch` bytes apart, of so many channels (at least `lanes`), and converts them.
  void (*stage)(const char* from, Index pitch, char* to, Index columns, Index channels);
  const TileShape* general;  // any taps, step and stride, any number of channels
  // As `certain` for the kernel gradient, which is added to what stands in `w`; the cotangent is in `y`.
  const WindowTiles* grads;
  void (*general_grad)(const Grad&);
  // Convert so many consecutive elements to the type of the sums and back; null where they are of it.
  void (*widen)(const char* from, char* to, Index count);
  void (*narrow)(const char* from, char* to, Index count);
};

// Told of each kernel before it runs; only the harness listens.
#if defined(DEPTHWISE_HARNESS)
void runs_kernel(TileKernel);
void runs_kernel(void (*)(const Grad&));
#else
inline void runs_kernel(TileKernel) {}
inline void runs_kernel(void (*)(const Grad&)) {}
#endif

namespace avx512 { Kernels kernels(Dtype); }
namespace avx2 { Kernels kernels(Dtype); }
namespace baseline { Kernels kernels(Dtype); }
namespace neon { Kernels kernels(Dtype); }

}  // namespace depthwise

// The innermost loops, which every instruction set provides once (kernels.cc): one tile of outputs, or what a tile of the
// cotangent adds to the kernel gradient, for a range of channels.
#pragma once

#include "depthwise.h"

namespace depthwise {

constexpr int kMostRows = 7;

// A row of taps, and the row of input under it for each of a tile's rows (null: outside).
struct TapRow {
  char* taps;
  const char* x[kMostRows];
};

// A tile of outputs: some consecutive ones along the last spatial axis, in some rows. Output j reads column
// `column` + j*stride + t*step through tap t, if 0 <= that < columns.
struct Tile {
  const TapRow* rows;
  Index count;
  Index column, columns;
  Index taps, step, stride;  // constants of all kernels but the general ones
  Index tap_offset;          // elements from the beginning of a row of taps to the first
  Index tap_pitch;           // elements from tap to tap
  Index pitch;               // elements from column to column of the input: the channels
  char* y[kMostRows];        // the first output of each row; the cotangent for the kernel gradient
  Index y_pitch;             // elements from output to output
  Index begin, end;          // channels
  const char* bias;          // null: none
  Activation activation;
  bool stream;               // store past the caches; addresses are aligned to the vectors
};
using TileKernel = void (*)(const Tile&);

struct TileShape {
  int width, height;
  TileKernel kernel;
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
  Index pitch;
  char* dw;
  Index begin, end;
};

// What one instruction set has for one dtype. Lists end with a null kernel and begin with what is best at equal cost.
struct Kernels {
  int lanes;
  // For so many taps side by side (step 1) and this stride, for at least `lanes` channels; empty where there are none.
  // They test only those columns that reach beyond the first or the last output.
  const TileShape* (*tiles)(Index taps, Index stride);
  // The same for the kernel gradient, added to what stands in `taps`; the cotangent is in `y`.
  const TileShape* (*grads)(Index taps, Index stride);
  const TileShape* wide;     // any number of taps side by side, stride 1, at least `lanes` channels
  const TileShape* general;  // any taps, step and stride, any number of channels
  void (*general_grad)(const Grad&);
};

namespace avx512 { Kernels kernels(Dtype); }
namespace avx2 { Kernels kernels(Dtype); }
namespace baseline { Kernels kernels(Dtype); }
namespace neon { Kernels kernels(Dtype); }

}  // namespace depthwise

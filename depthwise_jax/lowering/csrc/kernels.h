// The innermost loops, which every instruction set provides once (kernels.cc): one tile of outputs, or the kernel
// gradient of some rows, for a range of channels.
#pragma once

#include "depthwise.h"

namespace depthwise {

// One row of input and the rows of taps through which it reaches the tile's one or two rows of output (null: none).
struct Row {
  const char* x;
  const char* w[2];
};

// A tile of consecutive outputs along the last spatial axis: output j reads column `column` + j*stride + t*step through
// tap t, if 0 <= that < columns.
struct Tile {
  const Row* rows;
  Index count;
  Index column, columns;
  Index taps, step, stride;    // stride, step and taps are constants of all kernels but the general ones
  Index tap_pitch;             // elements from tap to tap of w
  Index pitch;                 // elements from column to column: the channels
  char* y[2];
  Index y_pitch;               // elements from output to output
  Index begin, end;            // channels
  const char* bias;            // null: none
  Activation activation;
  bool stream;                 // store past the caches; addresses are aligned to the vectors
  const char* ahead;           // null, or a row of input to fetch into the caches, and ahead_rows - 1 behind it
  Index ahead_rows, ahead_pitch;
};
using TileKernel = void (*)(const Tile&);

// The kernel gradient of `count` rows of g, added to dw.
struct GradRow {
  const char* g;
  const char* x[8];  // the row under each row of taps, null where it lies outside
};
struct Grad {
  const GradRow* rows;
  Index count;
  Index column, columns, outputs;
  Index taps, step, stride;
  Index pitch;
  char* dw;
  Index row_pitch;             // elements from one row of taps to the next
  Index begin, end;
};
using GradKernel = void (*)(const Grad&);

constexpr int kMany = -1;
struct TileShape {
  int taps, stride, width, height;  // taps 0: any taps, step and stride; kMany: any taps
  TileKernel kernel;
};
struct GradShape {
  int taps, height, stride;  // taps 0: any
  GradKernel kernel;
};

// What one instruction set has for one dtype. Lists end with a null kernel; general kernels come last.
struct Kernels {
  int lanes;
  const TileShape* tiles;
  const GradShape* grads;
};

namespace avx512 { Kernels kernels(Dtype); }
namespace avx2 { Kernels kernels(Dtype); }
namespace baseline { Kernels kernels(Dtype); }
namespace neon { Kernels kernels(Dtype); }

}  // namespace depthwise

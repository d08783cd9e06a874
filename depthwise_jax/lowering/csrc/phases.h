// Phases: how the transpose of a strided convolution becomes a few correlations without strides.
#pragma once

#include <vector>

#include "depthwise.h"

namespace depthwise {

// A correlation along all axes: forward, or the transpose in x.
struct CorrelationSpec {
  const Geometry& geometry;
  bool transposed;
  const Index* in;   // spatial sizes of what is read
  const Index* out;  // and of what is written
};

// The outputs along an axis that share their taps. Output j is written at first + j*pitch, and reads position
// `column` + j*stride + k*step through tap `tap` + k*tap_step, for k < taps, if that lies inside the input.
struct Phase {
  Index taps, tap, tap_step;
  Index column, step, stride;
  Index first, pitch, count;
};

std::vector<Phase> phases(const CorrelationSpec& spec, int axis);

// The taps of the phase that has the most.
Index most_taps(const std::vector<Phase>& phases);

}  // namespace depthwise

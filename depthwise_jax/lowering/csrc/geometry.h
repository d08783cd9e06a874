// Arithmetic of sizes that several files need.
#pragma once

#include "depthwise.h"

namespace depthwise {

// a / b rounded up, for b > 0.
inline Index ceil_div(Index a, Index b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// The size of an element, and of a sum of elements.
inline Index element_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
inline Index sum_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

}  // namespace depthwise

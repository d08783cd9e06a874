#include "phases.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace depthwise {
namespace {

// The inverse of `a` modulo `n`, for a and n without a common factor; 0 modulo 1.
Index inverse(Index a, Index n) {
  Index factor = 0, next = 1, rest = n, divisor = a % n;
  while (divisor) {  // factor*a = rest and next*a = divisor, modulo n
    const Index quotient = rest / divisor;
    factor = std::exchange(next, factor - quotient * next);
    rest = std::exchange(divisor, rest - quotient * divisor);
  }
  return factor < 0 ? factor + n : factor;
}

}  // namespace

// Forward there is one phase. Transposed, input i = s*q + r - low is reached by the taps t with t*d = r modulo s, from
// output q + (r - t*d)/s: one phase for each r. Its taps are s/gcd(s, d) apart and are taken backwards, because outputs
// ascend then.
std::vector<Phase> phases(const CorrelationSpec& spec, int axis) {
  const Geometry& g = spec.geometry;
  const Index s = g.stride[axis], d = g.dilation[axis], low = g.low[axis], window = g.window[axis];
  if (!spec.transposed) return {{window, 0, 1, -low, d, s, 0, 1, g.out[axis]}};
  const Index common = std::gcd(s, d), tap_distance = s / common, step = d / common;
  const Index tap_of_common = inverse(step, tap_distance);  // the first tap t with t*d = common modulo s
  // A single output or tap has no stride or distance: the product with an array's pitch might overflow.
  const Index pitch = std::min(s, g.in[axis]);
  std::vector<Phase> result;
  result.reserve(pitch);
  for (Index first = 0; first < pitch; ++first) {
    const Index r = (first + low) % s, q = (first + low) / s;
    const Index count = (g.in[axis] - 1 - first) / s + 1;
    const Index tap = r / common * tap_of_common % tap_distance;  // the product is below s*s
    if (r % common || tap >= window) {
      result.push_back({0, 0, 0, 0, 1, 1, first, pitch, count});
      continue;
    }
    const Index taps = (window - 1 - tap) / tap_distance + 1;
    const Index column = q + (r - tap * d) / s - (taps - 1) * step;
    const Index last_tap = tap + (taps - 1) * tap_distance, tap_step = taps > 1 ? -tap_distance : 0;
    result.push_back({taps, last_tap, tap_step, column, step, 1, first, pitch, count});
  }
  return result;
}

Index most_taps(const std::vector<Phase>& phases) {
  Index most = 0;
  for (const Phase& phase : phases) most = std::max(most, phase.taps);
  return most;
}

}  // namespace depthwise

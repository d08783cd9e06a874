// Which geometries the maps accept.
#include "geometry.h"

#include <algorithm>

namespace depthwise {

const char* geometry_error(const Geometry& g) {
  // Far beyond any array. Products of two sizes stay in range, and so do the bytes of an array.
  constexpr Index kLimit = Index{1} << 31;
  constexpr double kElements = 0x1p56;
  if (g.stack < 0 || g.batch < 0) return "a negative number of images";
  if (g.multiplier < 1) return "no kernels";
  if (g.channels < 1) return "no channels";
  if (g.multiplier > kLimit || g.channels > kLimit) return "a size above 2**31";
  const double images = static_cast<double>(std::max<Index>(g.stack, 1)) * static_cast<double>(g.multiplier) *
                        static_cast<double>(std::max<Index>(g.batch, 1)) * static_cast<double>(g.channels);
  double in = images, out = images, window = images;  // elements; an empty axis counts as one of size 1
  for (int i = 0; i < 3; ++i) {
    if (g.in[i] < 0) return "a negative size";
    if (g.window[i] < 1) return "an empty window";
    if (g.stride[i] < 1) return "a stride below 1";
    if (g.dilation[i] < 1) return "a dilation below 1";
    if (g.low[i] < 0) return "a negative padding";
    if (g.out[i] < 1) return "an empty output";
    if (g.in[i] > kLimit || g.out[i] > kLimit) return "a size above 2**31";
    if (g.window[i] > kLimit) return "a window above 2**31";
    if (g.stride[i] > kLimit) return "a stride above 2**31";
    if (g.dilation[i] > kLimit) return "a dilation above 2**31";
    if (g.low[i] > kLimit) return "a padding above 2**31";
    in *= static_cast<double>(std::max<Index>(g.in[i], 1));
    out *= static_cast<double>(g.out[i]);
    window *= static_cast<double>(g.window[i]);
  }
  if (std::max({in, out, window}) > kElements) return "arrays of more than 2**56 elements";
  return nullptr;
}

}  // namespace depthwise

// Which instruction set's loops a call uses.
#pragma once

#include "depthwise.h"
#include "loops.h"

namespace depthwise {

// The loops with the widest vectors that the channels fill, or else with the narrowest.
Loops loops_for(Dtype dtype, Index channels);

}  // namespace depthwise

// Where f's output lies, as the bindings are told.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "deqfast/args.h"

namespace deqfast {

// Strides in numbers.
inline void place(Source& s, std::uintptr_t data, DType dtype, int64_t batch_stride, bool dense,
                  const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    if (sizes.size() > kMaxDims)
        throw std::invalid_argument("f(z): at most " + std::to_string(kMaxDims) +
                                    " inner dimensions can be read through strides, got " +
                                    std::to_string(sizes.size()));
    s.data = reinterpret_cast<void*>(data);
    s.dtype = dtype;
    s.batch_stride = batch_stride;
    s.dense = dense;
    s.ndim = int(sizes.size());
    std::copy(sizes.begin(), sizes.end(), s.size);
    std::copy(strides.begin(), strides.end(), s.stride);
}

}  // namespace deqfast

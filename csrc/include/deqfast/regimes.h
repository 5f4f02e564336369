// The sizes at which a kernel goes about its work in another way. N alone decides, so that the batch cannot change a
// bit. The module exports kRegimes.
#pragma once

#include "deqfast/constants.h"

namespace deqfast {

// ---- on a CPU ----
constexpr int64_t kGramMinN = 1 << 16;      // Broyden from this on: products with a Gram matrix, else the chain
constexpr int kShortN = 32;                 // samples up to this are handled kLanes at a time, one a lane
constexpr int64_t kTileMaxN = 1024;         // samples up to this share one small solve, up to 16 at a time
constexpr int64_t kGroupBytes = 768 << 10;  // history of the samples that share it: must still be in L2 when mixed
constexpr int64_t kSplitMinN = 1 << 16;     // larger samples are split over threads
constexpr int kChunk = 8 * 1024;            // numbers whose products are added up in one accumulator

// ---- on a GPU ----
constexpr int64_t kBlockMaxN = 4096;       // samples up to this take one block and one launch a step
constexpr int64_t kDeviceGramMinN = 8193;  // kGramMinN there: a chain is one block's work
constexpr int64_t kSplitChunk = 4096;      // numbers of a larger sample that one block handles

constexpr Named kRegimes[] = {
    {"TINY", kTinyN},
    {"GRAM_MIN_N", double(kGramMinN)},
    {"CPU_SHORT", kShortN},
    {"CPU_TILE_MAX_N", double(kTileMaxN)},
    {"CPU_GROUP_BYTES", double(kGroupBytes)},
    {"CPU_SPLIT_MIN_N", double(kSplitMinN)},
    {"CPU_CHUNK", kChunk},
    {"GPU_GRAM_MIN_N", double(kDeviceGramMinN)},
    {"GPU_BLOCK_MAX_N", double(kBlockMaxN)},
    {"GPU_SPLIT_CHUNK", double(kSplitChunk)},
};

}  // namespace deqfast

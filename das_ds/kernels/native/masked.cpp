// Masked AdamW and the soft update over a range of a flat float32 tensor, one pass each; see native/__init__.py.
//
// Importance of element i: by parameter (one stored value each), by unit (a table of segments, see
// functional/masks.py, whose row and column importances lie in `values`), or none.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Segment {
    int64_t start, numel, offset, num_columns, rows, columns;
};

enum Kind : int32_t { NONE = 0, UNITS = 1, FLOAT32 = 2, BFLOAT16 = 3, UINT8 = 4 };

float stored(const void* importance, int32_t kind, int64_t i) {
    if (kind == FLOAT32) return static_cast<const float*>(importance)[i];
    if (kind == UINT8) return static_cast<const uint8_t*>(importance)[i] / 255.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(importance)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Writes the importance of elements [begin, end) to `shares`, row by row of the segments they lie in; `segment` is
// moved on to the one that contains `end`.
void expand(const Segment*& segment, const float* values, int64_t begin, int64_t end, float* shares) {
    for (int64_t i = begin; i < end;) {
        while (i >= segment->start + segment->numel) ++segment;
        const int64_t stop = std::min(end, segment->start + segment->numel);
        if (segment->rows < 0 && segment->columns < 0) {
            std::fill(shares, shares + (stop - i), 0.0f);
            shares += stop - i;
            i = stop;
            continue;
        }
        const int64_t element = segment->offset + i - segment->start;
        int64_t row = element / segment->num_columns, column = element % segment->num_columns;
        for (; i < stop; ++row, column = 0) {
            const int64_t length = std::min(stop - i, segment->num_columns - column);
            const float share = segment->rows < 0 ? 0.0f : values[segment->rows + row];
            if (segment->columns < 0) {
                std::fill(shares, shares + length, share);
            } else {
                const float* by_column = values + segment->columns + column;
                for (int64_t c = 0; c < length; ++c) shares[c] = std::max(share, by_column[c]);
            }
            shares += length;
            i += length;
        }
    }
}

// Importance by unit is written out for a few kilobytes at a time: one long loop over them is faster than a short
// one for each row.
template <class Run>
void by_units(const Segment* segments, int64_t num_segments, const float* values, int64_t begin, int64_t end, Run run) {
    constexpr int64_t CHUNK = 4096;
    float shares[CHUNK];
    const Segment* segment = std::upper_bound(segments, segments + num_segments, begin,
                                              [](int64_t i, const Segment& s) { return i < s.start; }) - 1;
    for (int64_t i = begin; i < end; i += CHUNK) {
        const int64_t stop = std::min(end, i + CHUNK);
        expand(segment, values, i, stop, shares);
        const float* of_element = shares - i;
        run(i, stop, [of_element](int64_t e) { return of_element[e]; });
    }
}

template <class Run>
void by_importance(int32_t kind, const void* importance, const Segment* segments, int64_t num_segments,
                   const float* values, int64_t begin, int64_t end, Run run) {
    switch (kind) {
        case NONE: run(begin, end, [](int64_t) { return 0.0f; }); break;
        case UNITS: by_units(segments, num_segments, values, begin, end, run); break;
        case FLOAT32: run(begin, end, [importance](int64_t i) { return stored(importance, FLOAT32, i); }); break;
        case BFLOAT16: run(begin, end, [importance](int64_t i) { return stored(importance, BFLOAT16, i); }); break;
        case UINT8: run(begin, end, [importance](int64_t i) { return stored(importance, UINT8, i); }); break;
    }
}

}  // namespace

extern "C" {

// theta <- theta - (1 - I) * (decay * theta + step_size * m / (sqrt(v) * root_correction + eps)), elements [begin, end).
void masked_adamw(float* __restrict__ param, const float* __restrict__ grad, float* __restrict__ exp_avg,
                  float* __restrict__ exp_avg_sq, int32_t kind, const void* importance, const Segment* segments,
                  int64_t num_segments, const float* values, int64_t begin, int64_t end, float inverse_scale,
                  float step_size, float root_correction, float share1, float share2, float eps, float decay) {
    by_importance(kind, importance, segments, num_segments, values, begin, end,
                  [=](int64_t first, int64_t last, auto share) {
                      for (int64_t i = first; i < last; ++i) {
                          const float g = grad[i] * inverse_scale;
                          const float m = exp_avg[i] + share1 * (g - exp_avg[i]);
                          const float v = exp_avg_sq[i] + share2 * (g * g - exp_avg_sq[i]);
                          const float delta = decay * param[i] + step_size * m / (std::sqrt(v) * root_correction + eps);
                          param[i] -= (1.0f - share(i)) * delta;
                          exp_avg[i] = m;
                          exp_avg_sq[i] = v;
                      }
                  });
}

// p <- p + (p_old - p) * I; element i of the flat tensor is param[i - start].
void soft_update(float* __restrict__ param, const float* __restrict__ old, int64_t start, int32_t kind,
                 const void* importance, const Segment* segments, int64_t num_segments, const float* values,
                 int64_t begin, int64_t end) {
    by_importance(kind, importance, segments, num_segments, values, begin, end,
                  [=](int64_t first, int64_t last, auto share) {
                      for (int64_t i = first; i < last; ++i) {
                          // From the nearer end, so that it is exact at 0 and at 1.
                          const float pull = share(i), now = param[i - start], before = old[i - start];
                          param[i - start] = pull < 0.5f ? now + pull * (before - now)
                                                         : before - (before - now) * (1.0f - pull);
                      }
                  });
}

}  // extern "C"

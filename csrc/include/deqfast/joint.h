// The joint map, first half of a joint step: what becomes of z, mu and x before they are accelerated. The formulas and
// the oracle are in deqfast/ops/formulas/joint.py.
#pragma once

#include "deqfast/args.h"

namespace deqfast {

enum class Ball : int { none, l2, linf };

// One tensor of the state. Those of a block stand together, the blocks in order.
struct JointPart {
    int64_t n = 0;  // numbers a sample
    int block = kStateBlock;
    const void* v = nullptr;       // the iterate, (B, n) dense
    void* mapped = nullptr;        // receives the mapped state, (B, n) dense
    const void* center = nullptr;  // of the ball, (B, n) dense in the accumulation type; null: the origin
    Source value;                  // f, p or q
};

struct JointArgs {
    int64_t B = 0;
    int n_parts = 0;
    int n_blocks = 0;
    JointPart* parts = nullptr;
    DType dtype = DType::f32;         // of the state
    const int32_t* status = nullptr;  // (B)
    const void* cost = nullptr;       // (B) of the accumulation type, null: none; no number: the sample stops
    double* block_norms = nullptr;    // (n_blocks, 2, padded): how far each block moves, how large it is
    int64_t padded = 0;
    double damping[2] = {1, 1};  // of z and mu
    double step_size = 1;        // of x
    bool normalize = false;      // divide the gradient of x by its norm, sample by sample
    Ball ball = Ball::none;
    double radius = 0, low = 0, high = 0;
    int threads = 1;
    int64_t chunks = 0;          // chunks a sample
    double* partials = nullptr;  // (B, chunks, 2)
    double* factors = nullptr;   // (B, 2): of the gradient of x, and of the way from the ball's centre

    // Whether the norm of x's gradient, or of its distance from the centre, is needed before x can be written.
    DEQFAST_HD bool needs_factors() const { return normalize || ball == Ball::l2; }
    DEQFAST_HD double& norm(int block, int which, int64_t b) const {
        return block_norms[(2 * block + which) * padded + b];
    }
    // What makes the adjoint's norm no number where the cost is none, else zero.
    template <class A>
    DEQFAST_HD double doubt(int block, int which, int64_t b) const {
        if (!cost || block != kAdjointBlock || which) return 0;
        const A given = static_cast<const A*>(cost)[b];
        return double(given - given);
    }
};

DEQFAST_HD inline double gradient_factor(const JointArgs& a, double norm) { return norm > 0 ? a.step_size / norm : 0; }
DEQFAST_HD inline double shrink_factor(const JointArgs& a, double norm) {
    return norm > a.radius ? a.radius / norm : 1;
}

// Constants of x's step in the accumulation type A; V is A or a register of it.
template <class A>
struct InputStep {
    A rate, shrink, radius, low, high;
    Ball ball;

    DEQFAST_HD InputStep(const JointArgs& a, double rate_, double shrink_)
        : rate(A(rate_)), shrink(A(shrink_)), radius(A(a.radius)), low(A(a.low)), high(A(a.high)), ball(a.ball) {}

    template <class V>
    DEQFAST_HD V stepped(V v, V q) const {
        return v - rate * q;
    }
    template <class V>
    DEQFAST_HD V projected(V t, V center) const {
        if (ball == Ball::l2) t = center + shrink * (t - center);
        if (ball == Ball::linf) t = clamped(t, center - radius, center + radius);
        return clamped(t, V{} + low, V{} + high);
    }
    // NaN stays NaN.
    template <class V>
    static DEQFAST_HD V clamped(V t, V least, V most) {
        t = t < least ? least : t;
        return t > most ? most : t;
    }
};

}  // namespace deqfast

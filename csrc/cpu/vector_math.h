// exp, exp - 1, sigmoid, tanh and the tanh form of GELU on vectors. Only adds, multiplies and fused multiply-adds: the
// same input gives the same bits in every lane.
#pragma once

#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

struct ReducedExponent {
    F32 power;      // n, an integer in float form
    F32 remainder;  // exp(x) - 1 for the rest, x - n * ln 2, which lies within ln 2 / 2 of zero
};

// A polynomial of degree 6 whose relative error stays below 2e-8 (minimax fit); NaN propagates through the remainder.
// clamped is x limited to where n is a normal exponent, with NaN replaced.
inline ReducedExponent reduce_exponent(F32 x, F32 clamped) {
    F32 n = round_to_nearest(mul(clamped, broadcast(1.44269504f)));
    F32 r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts: n times the first is exact
    r = fma(n, broadcast(2.12194440e-4f), r);
    F32 q = fma(broadcast(0x1.6bebf2p-10f), r, broadcast(0x1.1227f6p-7f));
    q = fma(q, r, broadcast(0x1.555674p-5f));
    q = fma(q, r, broadcast(0x1.5554bp-3f));
    q = fma(q, r, broadcast(0x1.fffffep-2f));
    return {n, fma(mul(r, r), q, r)};
}

// Relative error below 1e-7 in [-87.3, 88.3]; 0 below and infinity above, so no result is subnormal.
inline F32 exp(F32 x) {
    const F32 lowest = broadcast(-87.3f);
    const F32 highest = broadcast(88.3f);
    ReducedExponent e = reduce_exponent(x, min(max(x, lowest), highest));
    F32 y = scale_by_power_of_two(add(e.remainder, broadcast(1.0f)), e.power);
    y = select_less(x, lowest, broadcast(0.0f), y);
    return select_less(highest, x, broadcast(__builtin_inff()), y);
}

// exp(x) - 1 for x <= 0, without cancellation near zero: relative error below 2e-7.
inline F32 exp_minus_one(F32 x) {
    const F32 lowest = broadcast(-87.3f);
    ReducedExponent e = reduce_exponent(max(lowest, x), max(x, lowest));  // the first lets a NaN pass
    F32 power = scale_by_power_of_two(broadcast(1.0f), e.power);
    return fma(power, e.remainder, sub(power, broadcast(1.0f)));
}

// 1 / (1 + exp(-x)): relative error below 2e-7 from -87 on; 0 below.
inline F32 sigmoid(F32 x) { return div(broadcast(1.0f), add(broadcast(1.0f), exp(sub(broadcast(0.0f), x)))); }

// Relative error below 2e-7 everywhere, subnormals included; odd, and exactly 1 from 10 on.
// With t = exp(2 |x|) - 1, tanh(|x|) = t / (t + 2): no cancellation near zero.
inline F32 tanh(F32 x) {
    F32 twice = mul(broadcast(2.0f), min(broadcast(10.0f), abs(x)));
    ReducedExponent e = reduce_exponent(twice, min(twice, broadcast(20.0f)));
    F32 power = scale_by_power_of_two(broadcast(1.0f), e.power);
    F32 t = fma(power, e.remainder, sub(power, broadcast(1.0f)));
    return copy_sign(div(t, add(t, broadcast(2.0f))), x);
}

// 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), written as x / (1 + exp(-2u)): absolute error below
// 1.3e-7 max(1, |x|), and no cancellation where tanh(u) is near -1.
inline F32 gelu_tanh(F32 x) {
    F32 cubic = fma(mul(mul(x, x), broadcast(0.044715f)), x, x);
    F32 e = exp(mul(cubic, broadcast(-1.59576912f)));
    return div(x, add(broadcast(1.0f), e));
}

// 2^r for r in [-0.5, 0.5]: relative error below 1.5e-7 (minimax fit of degree 5, and rounding).
inline F32 exp2_fraction(F32 r) {
    F32 p = fma(broadcast(0x1.5c08e6p-10f), r, broadcast(0x1.3d0c54p-7f));
    p = fma(p, r, broadcast(0x1.c6b6e4p-5f));
    p = fma(p, r, broadcast(0x1.ebf918p-3f));
    p = fma(p, r, broadcast(0x1.62e428p-1f));
    return fma(p, r, broadcast(0x1.000002p+0f));
}

// 2^(k tanh(y)) for k in [0, 100], without a subtraction that could cancel. tanh(y) = y P(y^2) / Q(y^2) within 1.5e-8
// (minimax fit), and 1 beyond 8.7; the numerator's coefficients hold k. The error is that of rounding the exponent:
// relative 1e-7 (2 + k |tanh(y)|).
class CappedExp2 {
  public:
    explicit CappedExp2(float k) {
        constexpr float kUnit[5] = {1.0f, 0x1.12710ep-3f, 0x1.cd3598p-9f, 0x1.60381cp-16f, 0x1.dd85a2p-27f};
        for (int i = 0; i < 5; ++i) numerator_[i] = k * kUnit[i];
    }

    F32 exponent(F32 y) const {
        y = max(broadcast(-8.7f), min(broadcast(8.7f), y));  // constants first: NaN passes
        const F32 z = mul(y, y);
        F32 p = fma(broadcast(numerator_[4]), z, broadcast(numerator_[3]));
        p = fma(p, z, broadcast(numerator_[2]));
        p = fma(p, z, broadcast(numerator_[1]));
        p = fma(p, z, broadcast(numerator_[0]));
        F32 q = fma(broadcast(0x1.ad4ffp-21f), z, broadcast(0x1.5c82acp-12f));
        q = fma(q, z, broadcast(0x1.a968bap-6f));
        q = fma(q, z, broadcast(0x1.de8dd4p-2f));
        q = fma(q, z, broadcast(1.0f));
        return div(mul(y, p), q);
    }

    F32 operator()(F32 y) const {
        const F32 t = exponent(y);
        const F32 n = round_to_nearest(t);
        // The clamp changes no number; it keeps a NaN away from the conversion to an integer.
        return scale_by_power_of_two(exp2_fraction(sub(t, n)), max(n, broadcast(-126.0f)));
    }

  private:
    float numerator_[5];
};

}  // namespace
GEMMA2_FAST_END_ISA

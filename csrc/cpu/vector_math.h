// exp, tanh and the tanh form of GELU on vectors. Only adds, multiplies and fused multiply-adds: the same input gives
// the same bits in every lane.
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

}  // namespace
GEMMA2_FAST_END_ISA

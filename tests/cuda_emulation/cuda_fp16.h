// float16 for the emulation: IEEE 754 binary16 with denormals, rounded to the nearest, ties to even.
#pragma once
#include <cmath>
#include <cstdint>

struct __half { uint16_t bits; };

inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    float result;
    if (exponent == 31) result = fraction ? NAN : INFINITY;
    else result = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return std::copysign(result, x.bits & 0x8000 ? -1.0f : 1.0f);
}
inline __half __float2half_rn(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (x != x) return {uint16_t(sign | 0x7fff)};
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    if (size < 0x1p-14f) return {uint16_t(sign | int(std::nearbyint(size * 0x1p24f)))};  // 1024 is the first normal one
    int exponent;
    const float part = std::frexp(size, &exponent);                                       // size = part * 2^exponent
    const int digits = int(std::nearbyint(part * 2048.0f));                               // 1024 to 2048
    return {uint16_t(sign | ((exponent + 13) << 10) + digits)};                           // the leading 1 adds 1 to the exponent
}

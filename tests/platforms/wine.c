/* What Debian's wine lacks of the functions that numpy, torch and safetensors import. wine.py builds and places it.

   Each function is exported without `own_`: under its own name mingw already has another, which computes the value. */

#include <complex.h>
#include <math.h>
#include <windows.h>

#include <bcrypt.h>

/* The Windows calling convention passes a complex number as the struct that Microsoft's headers make of it, and gcc
   passes `float _Complex` in a way of its own: so the exported functions take structs, and a union turns one into the
   other. */
#define TYPES(real)                                                  \
    typedef struct { real re, im; } real##_pair;                     \
    typedef union { real##_pair pair; real _Complex number; } real##_both;

TYPES(float)
TYPES(double)

#define TO_REAL(real, name, function)                                \
    real own_##name(real##_pair z)                                   \
    {                                                                \
        real##_both of = {z};                                        \
        return function(of.number);                                  \
    }

#define TO_COMPLEX(real, name, function)                             \
    real##_pair own_##name(real##_pair z)                            \
    {                                                                \
        real##_both of = {z};                                        \
        of.number = function(of.number);                             \
        return of.pair;                                              \
    }

#define TWO_TO_COMPLEX(real, name, function)                         \
    real##_pair own_##name(real##_pair z, real##_pair w)             \
    {                                                                \
        real##_both of = {z}, by = {w};                              \
        of.number = function(of.number, by.number);                  \
        return of.pair;                                              \
    }

/* `long double` is `double` on Windows, and has 80 bits in mingw: names with `l` compute with `double`. */
#define EACH(kind, name)                                             \
    kind(float, name##f, name##f)                                    \
    kind(double, name, name)                                         \
    kind(double, name##l, name)

EACH(TO_REAL, creal)
EACH(TO_REAL, cimag)
EACH(TO_REAL, cabs)
EACH(TO_REAL, carg)
EACH(TO_COMPLEX, cexp)
EACH(TO_COMPLEX, csin)
EACH(TO_COMPLEX, ccos)
EACH(TO_COMPLEX, ctan)
EACH(TO_COMPLEX, csinh)
EACH(TO_COMPLEX, ccosh)
EACH(TO_COMPLEX, ctanh)
EACH(TWO_TO_COMPLEX, cpow)

#define LONG(name) double own_##name##l(double x) { return name(x); }
#define LONG_OF_TWO(name) double own_##name##l(double x, double y) { return name(x, y); }

LONG(cbrt)
LONG(exp2)
LONG(expm1)
LONG(log1p)
LONG(rint)
LONG(trunc)
LONG_OF_TWO(copysign)
LONG_OF_TWO(nextafter)

/* Random bytes for the hash tables of Rust, from bcryptprimitives.dll. */
BOOL own_ProcessPrng(unsigned char *bytes, size_t count)
{
    return BCryptGenRandom(NULL, bytes, (ULONG)count, BCRYPT_USE_SYSTEM_PREFERRED_RNG) == 0;
}

/* What Debian's wine lacks of the functions that numpy, torch and safetensors import. wine.py builds and places it.

   Each function is exported without `own_`: under its own name mingw already has another, which computes the value. */

#include <complex.h>
#include <math.h>
#include <windows.h>

#include <bcrypt.h>

/* The Windows calling convention passes a complex number as the struct that Microsoft's headers make of it, gcc passes
   `float _Complex` in a way of its own: hence structs outside and a union that reads them as what gcc computes with. */
#define TYPES(real)                                   \
    typedef struct { real re, im; } real##_struct;    \
    typedef union { real##_struct parts; real _Complex whole; } real##_union;

TYPES(float)
TYPES(double)

#define PART(real, name, function)                    \
    real own_##name(real##_struct z) { return function(((real##_union){z}).whole); }

#define FUNCTION(real, name, function)                \
    real##_struct own_##name(real##_struct z) { return ((real##_union){.whole = function(((real##_union){z}).whole)}).parts; }

#define POWER(real, name, function)                   \
    real##_struct own_##name(real##_struct z, real##_struct w)                                                        \
    { return ((real##_union){.whole = function(((real##_union){z}).whole, ((real##_union){w}).whole)}).parts; }

/* `long double` is `double` on Windows, where mingw's own has 80 bits: names with `l` compute with `double`. */
#define EACH(kind, name) kind(float, name##f, name##f) kind(double, name, name) kind(double, name##l, name)

EACH(PART, creal)
EACH(PART, cimag)
EACH(PART, cabs)
EACH(PART, carg)
EACH(FUNCTION, cexp)
EACH(FUNCTION, csin)
EACH(FUNCTION, ccos)
EACH(FUNCTION, ctan)
EACH(FUNCTION, csinh)
EACH(FUNCTION, ccosh)
EACH(FUNCTION, ctanh)
EACH(POWER, cpow)

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

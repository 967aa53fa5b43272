/* The present clock and fused multiply-add rate of one core.
   Prints the clock in hertz, and multiply-adds a cycle at 512, 256 and 128 bits (0: none).

   cc -O1 processor_rates.c -o processor_rates && ./processor_rates */
#include <stdio.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

#define TIMES 20000000L
#if defined(__x86_64__)
/* Ten dependent additions take ten cycles. */
#define ADD2 "add %0,%0\nadd %0,%0\n"
#define ADD10 ADD2 ADD2 ADD2 ADD2 ADD2
#define F(r, i) "vfmadd231ps %%" r "15,%%" r "14,%%" r #i "\n"
#define FMA6(r) F(r, 0) F(r, 1) F(r, 2) F(r, 3) F(r, 4) F(r, 5)
#define FMA12(r) FMA6(r) F(r, 6) F(r, 7) F(r, 8) F(r, 9) F(r, 10) F(r, 11)
#define CLOBBERS                                                                                   \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"
#elif defined(__aarch64__)
#define ADD2 "add %0,%0,%0\nadd %0,%0,%0\n"
#define ADD10 ADD2 ADD2 ADD2 ADD2 ADD2
#define F(i) "fmla v" #i ".4s,v30.4s,v31.4s\n"
#define FMA12 F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
#define CLOBBERS "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11"
#endif

static double clock_hz(void) {
    unsigned long x = 1;
    double start = now();
    for (long i = 0; i < TIMES; i++) __asm__ volatile(ADD10 : "+r"(x));
    return 10.0 * TIMES / (now() - start);
}

#define RATE(name, code, lanes)                                                                    \
    static double name(void) {                                                                     \
        double start = now();                                                                      \
        for (long i = 0; i < TIMES; i++) __asm__ volatile(code::: CLOBBERS);                       \
        return 12.0 * lanes * TIMES / (now() - start);                                             \
    }

#if defined(__x86_64__)
RATE(fma512, FMA12("zmm"), 16)
RATE(fma256, FMA12("ymm"), 8)
RATE(fma128, FMA12("xmm"), 4)
#else
RATE(fma128, FMA12, 4)
#endif

int main(void) {
    double best_clock = 0, wide = 0, middle = 0, narrow = 0;
    for (int i = 0; i < 5; i++) {
        double c = clock_hz(), n;
        if (c > best_clock) best_clock = c;
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && (n = fma512()) > wide) wide = n;
        if (__builtin_cpu_supports("fma") && (n = fma256()) > middle) middle = n;
        if (__builtin_cpu_supports("fma") && (n = fma128()) > narrow) narrow = n;
#else
        if ((n = fma128()) > narrow) narrow = n;
#endif
    }
    printf("%.0f %.2f %.2f %.2f\n", best_clock, wide / best_clock, middle / best_clock,
           narrow / best_clock);
    return 0;
}

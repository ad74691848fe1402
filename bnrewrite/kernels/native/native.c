/* Kernels of BatchNorm for CPUs: what the phases compute, a call each.

   They do what bnrewrite.kernels.aten composes of calls of ATen, with fewer passes over memory and
   without calls between: statistics of a channel or a chunk of rows are taken while it is in cache,
   coefficients are made where they are used. The mathematics is in bnrewrite/reference.py, and the
   callers, who check every size, are in bnrewrite/kernels/native/__init__.py.

   Every function returns 0, or 1 if there is no memory for its scratch. Tensors are dense: either
   contiguous, N * C rows of S values, or with `last` set channels-last, N * S rows of C values.
   Bytes per value of x, in units of its size: moments reads x once; normalize reads x and writes y,
   and reads the residual; backward_reduce reads g and x, and behind an activation also y, and
   writes what it makes of g; backward reads g and x and writes dx. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* One copy of each kernel for every width of vectors; the loader takes what the machine has. */
#if defined(__x86_64__) && defined(__linux__) && !defined(BNREWRITE_ONE_TARGET)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

enum { LANES = 8, CHUNK = 4096 };

struct shape {
    int64_t N, C, S;
    int last;
};

/* slope * z below zero and at most `top`, which is NaN for no limit: identity, ReLU, ReLU6 and leaky
   ReLU. */
struct activation {
    int is_identity, is_leaky;
    double slope, top;
};

/* What a gradient passes first: the result of the activation, and where its gradient goes. */
struct behind {
    const void *result;
    void *inner;
    struct activation act;
};

struct running {
    void *mean, *var;
    double factor;
};

struct kernels {
    size_t statistic;
    void (*rows_moments)(const void *, struct shape, int64_t, int64_t, double *);
    void (*chunk_moments)(const void *, int64_t, int64_t, int64_t, void *, double *);
    void (*rows_gradients)(const void *, const void *, struct behind, struct shape, int64_t,
                           int64_t, const void *, double *);
    void (*chunk_gradients)(const void *, const void *, struct behind, int64_t, int64_t, int64_t,
                            const void *, void *, double *);
    void (*normalize)(const void *, const void *, void *, struct shape, int64_t, int64_t,
                      const void *, struct activation);
    void (*apply)(const void *, const void *, void *, struct shape, int64_t, int64_t, const void *);
    void (*statistics)(const double *, int64_t, double, void *, void *, struct running);
    void (*normalize_coefficients)(const double *, int64_t, const void *, const void *,
                                   const void *, void *);
    void (*apply_coefficients)(const void *, double, int64_t, const void *, const double *, void *);
    void (*scale_products)(const void *, int64_t, double *);
};

static ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static ALWAYS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Adds `size` values to a sum and a sum of squares, given the sums of their distances to `centre`
   and of the squares of those: the variance around the mean first, then what the mean adds. */
static ALWAYS_INLINE void add_moments(int64_t size, double centre, double rest, double m2,
                                      double *sum, double *square) {
    double mean = centre + rest / size, total = size * mean;
    *sum += total;
    *square += m2 - rest * rest / size + total * mean;
}

#define VECTOR(type) type __attribute__((vector_size(LANES * sizeof(type))))
typedef VECTOR(float) float_V;
typedef VECTOR(double) double_V;
typedef VECTOR(uint16_t) half_V;
typedef VECTOR(uint32_t) bits_V;

static ALWAYS_INLINE float_V load_float_V(const float *p) {
    float_V v;
    memcpy(&v, p, sizeof v);
    return v;
}

static ALWAYS_INLINE double_V load_double_V(const double *p) {
    double_V v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* bfloat16 is the upper half of a float. */
static ALWAYS_INLINE float load_bfloat16(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static ALWAYS_INLINE float_V load_bfloat16_V(const uint16_t *p) {
    half_V half;
    memcpy(&half, p, sizeof half);
    return (float_V)(__builtin_convertvector(half, bits_V) << 16);
}

/* To the nearest, ties to even. */
static ALWAYS_INLINE void store_bfloat16(uint16_t *p, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *p = (uint16_t)(value == value ? rounded : 0x7fc0);
}

#define LOAD(p) (*(p))
#define STORE(p, a) (*(p) = (a))

#define T float
#define A float
#define V float_V
#define NAME(f) f##_float
#define LOAD_V(p) load_float_V(p)
#include "typed.h"
#undef T
#undef A
#undef V
#undef NAME
#undef LOAD_V

#define T double
#define A double
#define V double_V
#define NAME(f) f##_double
#define LOAD_V(p) load_double_V(p)
#include "typed.h"
#undef T
#undef A
#undef V
#undef NAME
#undef LOAD
#undef LOAD_V
#undef STORE

#define T uint16_t
#define A float
#define V float_V
#define NAME(f) f##_bfloat16
#define LOAD(p) load_bfloat16(p)
#define LOAD_V(p) load_bfloat16_V(p)
#define STORE(p, a) store_bfloat16(p, a)
#include "typed.h"

static const struct kernels *const KERNELS[] = {&kernels_float, &kernels_double, &kernels_bfloat16};

/* Channels-last tensors are reduced in groups of rows, which depend on the shape alone, and these in
   chunks that stay in cache and are short enough to be summed one after the other. */
enum { MAX_GROUPS = 16, GROUP = 1 << 17 };

struct rows {
    int64_t num, chunk, groups;
};

static struct rows rows_of(struct shape d) {
    int64_t num = d.N * d.S;
    return (struct rows){num, larger(32, smaller(256, 16384 / d.C)),
                         larger(1, smaller(MAX_GROUPS, num * d.C / GROUP))};
}

/* Adds up what the groups have summed, in their order. */
static void add_groups(const double *parts, int64_t groups, int64_t size, double *sums) {
    memset(sums, 0, size * sizeof(double));
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < size; i++) sums[i] += parts[g * size + i];
}

/* One of the two reductions, of x or of g and x: (2, C) sums. */
static int reduce(const struct kernels *k, const void *g, const void *x, struct behind b,
                  struct shape d, const void *means, double *sums, int threads) {
    if (!d.last) {
        memset(sums, 0, 2 * d.C * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int t = 0; t < threads; t++) {
            int64_t first = d.C * t / threads, end = d.C * (t + 1) / threads;
            if (g)
                k->rows_gradients(g, x, b, d, first, end, means, sums);
            else
                k->rows_moments(x, d, first, end, sums);
        }
        return 0;
    }
    struct rows rows = rows_of(d);
    size_t part = 2 * d.C * sizeof(double), scratch = 3 * d.C * k->statistic;
    char *memory = calloc(rows.groups, part + scratch);
    if (!memory) return 1;
    double *parts = (double *)memory;
    char *scratches = memory + rows.groups * part;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t group = 0; group < rows.groups; group++) {
        int64_t first = rows.num * group / rows.groups, end = rows.num * (group + 1) / rows.groups;
        double *own = parts + group * 2 * d.C;
        for (int64_t start = first; start < end; start += rows.chunk) {
            int64_t stop = smaller(end, start + rows.chunk);
            if (g)
                k->chunk_gradients(g, x, b, d.C, start, stop, means, scratches + group * scratch,
                                   own);
            else
                k->chunk_moments(x, d.C, start, stop, scratches + group * scratch, own);
        }
    }
    add_groups(parts, rows.groups, 2 * d.C, sums);
    free(memory);
    return 0;
}

/* Changes whenever arguments of a function do. */
EXPORT int bnrewrite_abi(void) { return 1; }

/* packed (2C + 1): count, sums, sums of squares. */
EXPORT int bnrewrite_moments(int dtype, int64_t N, int64_t C, int64_t S, int last, const void *x,
                             double *packed, int threads) {
    struct shape d = {N, C, S, last};
    packed[0] = (double)(N * S);
    return reduce(KERNELS[dtype], NULL, x, (struct behind){0}, d, NULL, packed + 1, threads);
}

/* Whether a batch counts: not where no rank holds a value, nor with `skip_nonfinite` where a sum is
   not finite. */
static int counts(const double *totals, int64_t C, int skip_nonfinite) {
    if (!(totals[0] > 0)) return 0;
    if (skip_nonfinite)
        for (int64_t i = 0; i <= 2 * C; i++)
            if (!isfinite(totals[i])) return 0;
    return 1;
}

/* Counts the batch and says how far the running statistics move towards it. A momentum that is NaN
   is a cumulative average, for which they stay without a counter. */
static double factor_of(int64_t *tracked, double momentum) {
    if (tracked) ++*tracked;
    if (momentum == momentum) return momentum;
    return tracked ? 1. / (double)larger(*tracked, 1) : 0;
}

/* stats (2, C), mean and rstd, and biased variance (C) from totals (2C + 1); moves the running
   statistics. These and the variance may be NULL. */
EXPORT int bnrewrite_statistics(int dtype, int64_t C, const double *totals, double eps,
                                void *running_mean, void *running_var, int64_t *tracked,
                                double momentum, int skip_nonfinite, void *stats,
                                void *variance) {
    struct running run = {NULL, NULL, 0};
    if (counts(totals, C, skip_nonfinite))
        run = (struct running){running_mean, running_var, factor_of(tracked, momentum)};
    KERNELS[dtype]->statistics(totals, C, eps, stats, variance, run);
    return 0;
}

/* y (N, C, S) from totals (2C + 1) and the rest of `bnrewrite_statistics`; weight, bias and residual
   may be NULL. */
EXPORT int bnrewrite_normalize(int dtype, int64_t N, int64_t C, int64_t S, int last, const void *x,
                               const double *totals, double eps, void *running_mean,
                               void *running_var, int64_t *tracked, double momentum,
                               int skip_nonfinite, void *stats, const void *weight,
                               const void *bias, const void *residual, int is_identity,
                               double slope, double top, void *y, int threads) {
    const struct kernels *k = KERNELS[dtype];
    struct shape d = {N, C, S, last};
    struct activation act = {is_identity, 0, slope, top};
    void *table = malloc(2 * C * k->statistic);
    if (!table) return 1;
    bnrewrite_statistics(dtype, C, totals, eps, running_mean, running_var, tracked, momentum,
                         skip_nonfinite, stats, NULL);
    k->normalize_coefficients(totals, C, stats, weight, bias, table);
    int64_t rows = N * (last ? S : C);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++)
        k->normalize(x, residual, y, d, rows * t / threads, rows * (t + 1) / threads, table, act);
    free(table);
    return 0;
}

/* sums (2C) of g and of g * xhat; behind an activation with `result`, whose gradient goes into
   `inner`, of that. */
EXPORT int bnrewrite_backward_reduce(int dtype, int64_t N, int64_t C, int64_t S, int last,
                                     const void *g, const void *x, const void *stats,
                                     const void *result, void *inner, int is_leaky, double slope,
                                     double top, double *sums, int threads) {
    const struct kernels *k = KERNELS[dtype];
    struct behind b = {result, inner, {0, is_leaky, slope, top}};
    if (reduce(k, g, x, b, (struct shape){N, C, S, last}, stats, sums, threads)) return 1;
    k->scale_products(stats, C, sums);
    return 0;
}

/* dx (N, C, S) from sums (2C) over totals[0] values; weight may be NULL. */
EXPORT int bnrewrite_backward(int dtype, int64_t N, int64_t C, int64_t S, int last, const void *g,
                              const void *x, const void *stats, const double *totals,
                              const void *weight, const double *sums, void *dx, int threads) {
    const struct kernels *k = KERNELS[dtype];
    struct shape d = {N, C, S, last};
    void *table = malloc(3 * C * k->statistic);
    if (!table) return 1;
    k->apply_coefficients(stats, totals[0], C, weight, sums, table);
    int64_t rows = N * (last ? S : C);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++)
        k->apply(g, x, dx, d, rows * t / threads, rows * (t + 1) / threads, table);
    free(table);
    return 0;
}

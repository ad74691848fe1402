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

/* One copy of each kernel with AVX2 and one without; the loader takes what the machine has. Vectors
   of AVX-512 are no faster, and slower where they cross the lines of the cache. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES
#endif

/* Bytes of a vector. Wider ones than the machine has go through memory. */
#if defined(__x86_64__)
#define REGISTER 32
#else
#define REGISTER 16
#endif

enum { CHUNK = 4096 };

struct shape {
    int64_t N, C, S;
    int last;
};

/* `width` channels from `first` on, of rows of C. */
struct block {
    int64_t C, first, width;
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
    void (*chunk_moments)(const void *, struct block, int64_t, int64_t, void *, double *);
    void (*rows_gradients)(const void *, const void *, struct behind, struct shape, int64_t,
                           int64_t, const void *, double *);
    void (*chunk_gradients)(const void *, const void *, struct behind, struct block, int64_t,
                            int64_t, const void *, void *, double *);
    void (*normalize)(const void *, const void *, void *, struct shape, int64_t, int64_t,
                      const void *, struct activation);
    void (*apply)(const void *, const void *, void *, struct shape, int64_t, int64_t, const void *,
                  const void *);
    void (*statistics)(const double *, int64_t, double, void *, void *, struct running);
    void (*normalize_coefficients)(const double *, int64_t, const void *, const void *,
                                   const void *, void *);
    void (*apply_coefficients)(const void *, double, int64_t, const void *, const double *, void *);
    void (*finish_gradients)(const void *, int64_t, double *, void *);
};

static ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static ALWAYS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Adds `size` values to a sum and a sum of squares, given the sums of their distances to `center`
   and of the squares of those: the variance around the mean first, then what the mean adds. */
static ALWAYS_INLINE void add_moments(int64_t size, double center, double rest, double m2,
                                      double *sum, double *square) {
    double share = 1. / size, mean = center + rest * share, total = size * mean;
    *sum += total;
    *square += m2 - rest * rest * share + total * mean;
}

typedef float float_V __attribute__((vector_size(REGISTER)));
typedef double double_V __attribute__((vector_size(REGISTER)));
typedef uint16_t half_V __attribute__((vector_size(REGISTER / 2)));
typedef uint32_t bits_V __attribute__((vector_size(REGISTER)));

/* Macros, since a function that gets or returns a vector has another ABI on each target. */
#define LOAD_VECTOR(type, p)         \
    ({                               \
        type loaded;                 \
        memcpy(&loaded, p, sizeof loaded); \
        loaded;                      \
    })
#define SUM_2(v, i) (v[i] + v[i + 1])
#define SUM_4(v, i) (SUM_2(v, i) + SUM_2(v, i + 2))
#define SUM_8(v, i) (SUM_4(v, i) + SUM_4(v, i + 4))
#if REGISTER == 32
#define SUM_FLOATS(v) SUM_8(v, 0)
#define SUM_DOUBLES(v) SUM_4(v, 0)
#else
#define SUM_FLOATS(v) SUM_4(v, 0)
#define SUM_DOUBLES(v) SUM_2(v, 0)
#endif

/* bfloat16 is the upper half of a float. */
static ALWAYS_INLINE float load_bfloat16(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define LOAD_BFLOAT16_V(p) \
    ((float_V)(__builtin_convertvector(LOAD_VECTOR(half_V, p), bits_V) << 16))

/* To the nearest, ties to even. */
static ALWAYS_INLINE void store_bfloat16(uint16_t *p, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *p = (uint16_t)(value == value ? rounded : 0x7fc0);
}

#define LOAD(p) (*(p))
#define STORE(p, a) (*(p) = (a))
#define CENTER(a, m) ((a) - (m))

#define T float
#define A float
#define V float_V
#define SUM(v) SUM_FLOATS(v)
#define NAME(f) f##_float
#define LOAD_V(p) LOAD_VECTOR(float_V, p)
#include "typed.h"
#undef T
#undef A
#undef V
#undef SUM
#undef NAME
#undef LOAD_V

#define T double
#define A double
#define V double_V
#define SUM(v) SUM_DOUBLES(v)
#define NAME(f) f##_double
#define LOAD_V(p) LOAD_VECTOR(double_V, p)
#include "typed.h"
#undef T
#undef A
#undef V
#undef SUM
#undef NAME
#undef LOAD
#undef LOAD_V
#undef STORE
#undef CENTER

#define T uint16_t
#define A float
#define V float_V
#define SUM(v) SUM_FLOATS(v)
#define NAME(f) f##_bfloat16
#define LOAD(p) load_bfloat16(p)
#define LOAD_V(p) LOAD_BFLOAT16_V(p)
#define STORE(p, a) store_bfloat16(p, a)
#define CENTER(a, m) ((void)(m), (a))
#include "typed.h"

static const struct kernels *const KERNELS[] = {&kernels_float, &kernels_double, &kernels_bfloat16};

/* Channels-last tensors are reduced in tasks that depend on the shape alone: a group of rows, for a
   block of channels whose sums stay in cache. A task works through chunks of rows that are short
   enough to be summed one after the other. */
enum { MAX_GROUPS = 16, GROUP = 1 << 17, BLOCK = 2048, LEAST_ROWS = 32, MOST_ROWS = 256 };

struct tasks {
    int64_t rows, chunk, groups, blocks;
};

static struct tasks tasks_of(struct shape d) {
    int64_t rows = d.N * d.S;
    int64_t groups = smaller(MAX_GROUPS, smaller(rows * d.C / GROUP, rows / LEAST_ROWS));
    int64_t chunk = larger(LEAST_ROWS, smaller(MOST_ROWS, 16384 / d.C));
    return (struct tasks){rows, chunk, larger(1, groups), (d.C + BLOCK - 1) / BLOCK};
}

/* One of the two reductions, of x or of g and x: (2, C) sums. */
static int reduce(const struct kernels *k, const void *g, const void *x, struct behind b,
                  struct shape d, const void *means, double *sums, int threads) {
    memset(sums, 0, 2 * d.C * sizeof(double));
    if (!d.last) {
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
    struct tasks all = tasks_of(d);
    size_t part = 2 * d.C * sizeof(double), scratch = 3 * BLOCK * sizeof(double);
    char *memory = calloc(all.groups * part + threads * scratch, 1);
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        void *own = memory + all.groups * part + t * scratch;
        for (int64_t task = t; task < all.groups * all.blocks; task += threads) {
            int64_t group = task / all.blocks, channel = task % all.blocks * BLOCK;
            int64_t first = all.rows * group / all.groups;
            int64_t end = all.rows * (group + 1) / all.groups;
            struct block block = {d.C, channel, smaller(BLOCK, d.C - channel)};
            double *into = (double *)(memory + group * part) + channel;
            for (int64_t start = first; start < end; start += all.chunk) {
                int64_t stop = smaller(end, start + all.chunk);
                if (g)
                    k->chunk_gradients(g, x, b, block, start, stop, means, own, into);
                else
                    k->chunk_moments(x, block, start, stop, own, into);
            }
        }
    }
    for (int64_t group = 0; group < all.groups; group++)
        for (int64_t i = 0; i < 2 * d.C; i++) sums[i] += ((double *)(memory + group * part))[i];
    free(memory);
    return 0;
}

/* Changes whenever arguments of a function do. */
EXPORT int bnrewrite_abi(void) { return 3; }

/* Every function has one argument, whose members are listed in load.py, too. */

/* An input (N, C, S), how it is laid out, and how many threads there are for it. */
struct input {
    int64_t dtype, N, C, S, last;
    const void *x;
    int64_t threads;
};

static struct shape shape_of(const struct input *of) {
    return (struct shape){of->N, of->C, of->S, (int)of->last};
}

struct moments_args {
    struct input input;
    double *packed;
};

/* packed (2C + 1): count, sums, sums of squares. */
EXPORT int bnrewrite_moments(const struct moments_args *a) {
    a->packed[0] = (double)(a->input.N * a->input.S);
    return reduce(KERNELS[a->input.dtype], NULL, a->input.x, (struct behind){0},
                  shape_of(&a->input), NULL, a->packed + 1, (int)a->input.threads);
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

/* What moves towards the statistics of a batch: running_mean and running_var (C), the counter, how
   far, see `factor_of`, and whether a batch that is not finite is left out. */
struct moving {
    double eps;
    void *mean, *var;
    int64_t *tracked;
    double momentum;
    int64_t skip_nonfinite;
};

struct statistics_args {
    int64_t dtype, C;
    const double *totals;
    struct moving moving;
    void *stats, *variance;
};

/* stats (2, C), mean and rstd, and biased variance (C) from totals (2C + 1); moves the running
   statistics. These and the variance may be NULL. */
EXPORT int bnrewrite_statistics(const struct statistics_args *a) {
    struct running run = {NULL, NULL, 0};
    if (counts(a->totals, a->C, (int)a->moving.skip_nonfinite))
        run = (struct running){a->moving.mean, a->moving.var,
                               factor_of(a->moving.tracked, a->moving.momentum)};
    KERNELS[a->dtype]->statistics(a->totals, a->C, a->moving.eps, a->stats, a->variance, run);
    return 0;
}

struct normalize_args {
    struct input input;
    const double *totals;
    struct moving moving;
    void *stats;
    const void *weight, *bias, *residual;
    int64_t is_identity;
    double slope, top;
    void *y;
};

/* y (N, C, S) from totals (2C + 1) and the rest of `bnrewrite_statistics`; weight, bias and residual
   may be NULL. */
EXPORT int bnrewrite_normalize(const struct normalize_args *a) {
    const struct kernels *k = KERNELS[a->input.dtype];
    struct shape d = shape_of(&a->input);
    struct activation act = {(int)a->is_identity, 0, a->slope, a->top};
    int threads = (int)a->input.threads;
    void *table = malloc(3 * d.C * k->statistic);
    if (!table) return 1;
    bnrewrite_statistics(&(struct statistics_args){a->input.dtype, d.C, a->totals, a->moving,
                                                   a->stats, NULL});
    k->normalize_coefficients(a->totals, d.C, a->stats, a->weight, a->bias, table);
    int64_t rows = d.N * (d.last ? d.S : d.C);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++)
        k->normalize(a->input.x, a->residual, a->y, d, rows * t / threads,
                     rows * (t + 1) / threads, table, act);
    free(table);
    return 0;
}

struct backward_reduce_args {
    struct input input;
    const void *g, *stats, *result;
    void *inner;
    int64_t is_leaky;
    double slope, top, *sums;
    void *gradients;
};

/* sums (2C) of g and of g * xhat; behind an activation with `result`, whose gradient goes into
   `inner`, of that. And the same as gradients (2C) of bias and weight. */
EXPORT int bnrewrite_backward_reduce(const struct backward_reduce_args *a) {
    const struct kernels *k = KERNELS[a->input.dtype];
    struct behind b = {a->result, a->inner, {0, (int)a->is_leaky, a->slope, a->top}};
    if (reduce(k, a->g, a->input.x, b, shape_of(&a->input), a->stats, a->sums,
               (int)a->input.threads))
        return 1;
    k->finish_gradients(a->stats, a->input.C, a->sums, a->gradients);
    return 0;
}

struct backward_args {
    struct input input;
    const void *g, *stats;
    const double *totals;
    const void *weight;
    const double *sums;
    void *dx;
};

/* dx (N, C, S) from sums (2C) over totals[0] values; weight may be NULL. */
EXPORT int bnrewrite_backward(const struct backward_args *a) {
    const struct kernels *k = KERNELS[a->input.dtype];
    struct shape d = shape_of(&a->input);
    int threads = (int)a->input.threads;
    void *table = malloc(3 * d.C * k->statistic);
    if (!table) return 1;
    k->apply_coefficients(a->stats, a->totals[0], d.C, a->weight, a->sums, table);
    int64_t rows = d.N * (d.last ? d.S : d.C);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++)
        k->apply(a->g, a->input.x, a->dx, d, rows * t / threads, rows * (t + 1) / threads, a->stats,
                 table);
    free(table);
    return 0;
}

/* The kernels for one type of values. native.c includes this file once for each, after defining

     NAME(f)       f with the suffix of the type
     T             type of a value in memory
     A             type of arithmetic and of statistics: float, or double for double
     V             as many values of A as a vector holds, LANES
     SUM(v)        of the lanes of a V
     LOAD(p)       one value as A
     LOAD_V(p)     LANES values as V
     CENTER(a, m)  a - m; or a, where T has so few digits that A loses none of them to a mean,
                   unless a channel is nearly constant, as in ATen
     STORE(p, a)   one value

   Lanes are summed apart, so the order of a sum is the same for any number of threads. What a chunk
   sums in A is added up in double. */

#define LANES (int64_t)(sizeof(V) / sizeof(A))

#define SUM_OF(vector)  \
    ({                  \
        V all = vector; \
        SUM(all);       \
    })

/* Contiguous tensors: rows of S values of one channel. Sums along a row need lanes of their own; the
   other loops the compiler turns into vectors by itself. */

static ALWAYS_INLINE A NAME(mean_of)(const T *x, int64_t size) {
    V sum = {0};
    A rest = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += LOAD_V(x + i);
    for (; i < size; i++) rest += LOAD(x + i);
    return (SUM_OF(sum) + rest) / (A)size;
}

/* One pass over each chunk, centered by the mean of its first eighth. That can be no further from
   the mean of the chunk than some deviations of the chunk, so few digits are lost, whatever the
   values are. Of a chunk with an infinite value the mean is that, as it should be. */
CLONES static void NAME(rows_moments)(const void *x_NCS, struct shape d, int64_t first, int64_t end,
                                      double *sums) {
    for (int64_t n = 0; n < d.N; n++)
        for (int64_t c = first; c < end; c++) {
            const T *row = (const T *)x_NCS + (n * d.C + c) * d.S;
            for (int64_t start = 0; start < d.S; start += CHUNK) {
                const T *x = row + start;
                int64_t size = smaller(d.S - start, CHUNK), i = 0;
                A center = NAME(mean_of)(x, smaller(size, larger(size / 8, 2 * LANES)));
                if (!isfinite(center)) center = 0;
                V r0 = {0}, r1 = {0}, q0 = {0}, q1 = {0};
                A r = 0, q = 0;
                for (; i + 2 * LANES <= size; i += 2 * LANES) {
                    V d0 = LOAD_V(x + i) - center, d1 = LOAD_V(x + i + LANES) - center;
                    r0 += d0, r1 += d1, q0 += d0 * d0, q1 += d1 * d1;
                }
                for (; i < size; i++) {
                    A distance = LOAD(x + i) - center;
                    r += distance, q += distance * distance;
                }
                add_moments(size, center, SUM_OF(r0 + r1) + r, SUM_OF(q0 + q1) + q,
                            sums + c, sums + d.C + c);
            }
        }
}

/* The gradient behind the activation of `size` values from `offset` on; g itself without one. */
static ALWAYS_INLINE const T *NAME(inner)(const void *g_all, struct behind b, int64_t offset,
                                          int64_t size) {
    if (!b.result) return (const T *)g_all + offset;
    const T *restrict g = (const T *)g_all + offset, *restrict y = (const T *)b.result + offset;
    T *restrict inner = (T *)b.inner + offset;
    A slope = (A)b.act.slope, top = (A)b.act.top;
    for (int64_t i = 0; i < size; i++) {
        A grad = LOAD(g + i), result = LOAD(y + i);
        A below = slope == 0 ? 0 : grad * slope;
        /* The derivative at NaN is what torch takes it for. */
        int is_below = b.act.is_leaky ? !(result > 0) : result <= 0;
        STORE(inner + i, is_below ? below : result >= top ? 0 : grad);
    }
    return inner;
}

CLONES static void NAME(rows_gradients)(const void *g_NCS, const void *x_NCS, struct behind b,
                                        struct shape d, int64_t first, int64_t end,
                                        const void *means, double *sums) {
    for (int64_t n = 0; n < d.N; n++)
        for (int64_t c = first; c < end; c++) {
            int64_t row = (n * d.C + c) * d.S;
            const T *g_row = NAME(inner)(g_NCS, b, row, d.S);
            A mean = ((const A *)means)[c];
            for (int64_t start = 0; start < d.S; start += CHUNK) {
                const T *g = g_row + start, *x = (const T *)x_NCS + row + start;
                int64_t size = smaller(d.S - start, CHUNK), i = 0;
                V s0 = {0}, s1 = {0}, p0 = {0}, p1 = {0};
                A s = 0, p = 0;
                for (; i + 2 * LANES <= size; i += 2 * LANES) {
                    V g0 = LOAD_V(g + i), g1 = LOAD_V(g + i + LANES);
                    s0 += g0, s1 += g1;
                    p0 += g0 * (LOAD_V(x + i) - mean);
                    p1 += g1 * (LOAD_V(x + i + LANES) - mean);
                }
                for (; i < size; i++) {
                    A grad = LOAD(g + i);
                    s += grad, p += grad * (LOAD(x + i) - mean);
                }
                sums[c] += SUM_OF(s0 + s1) + s;
                sums[d.C + c] += SUM_OF(p0 + p1) + p;
            }
        }
}

/* Channels-last tensors: chunks of rows of C values, one of each channel, for a block of channels.
   `scratch` holds three A for each of them; `sums` is where the block begins in (2, C).
   One row after the other: several at once load and store sums less often and are faster in cache,
   but slower from memory. */

CLONES static void NAME(chunk_moments)(const void *x_RC, struct block b, int64_t first, int64_t end,
                                       void *scratch, double *sums) {
    int64_t width = b.width, size = end - first, eighth = larger(size / 8, 1);
    A *restrict center = scratch, *restrict rest = center + width, *restrict m2 = rest + width;
    memset(scratch, 0, 3 * width * sizeof(A));
    for (int64_t r = first; r < first + eighth; r++) {
        const T *restrict x = (const T *)x_RC + r * b.C + b.first;
        for (int64_t c = 0; c < width; c++) center[c] += LOAD(x + c);
    }
    for (int64_t c = 0; c < width; c++) {
        A mean = center[c] / (A)eighth;
        center[c] = isfinite(mean) ? mean : 0;
    }
    for (int64_t r = first; r < end; r++) {
        const T *restrict x = (const T *)x_RC + r * b.C + b.first;
        for (int64_t c = 0; c < width; c++) {
            A distance = LOAD(x + c) - center[c];
            rest[c] += distance, m2[c] += distance * distance;
        }
    }
    double *restrict sum = sums, *restrict square = sums + b.C;
    for (int64_t c = 0; c < width; c++)
        add_moments(size, center[c], rest[c], m2[c], sum + c, square + c);
}

CLONES static void NAME(chunk_gradients)(const void *g_RC, const void *x_RC, struct behind act,
                                         struct block b, int64_t first, int64_t end,
                                         const void *means, void *scratch, double *sums) {
    int64_t width = b.width;
    const A *restrict mean = (const A *)means + b.first;
    A *restrict sum = scratch, *restrict product = sum + width;
    memset(scratch, 0, 2 * width * sizeof(A));
    for (int64_t r = first; r < end; r++) {
        const T *restrict g = NAME(inner)(g_RC, act, r * b.C + b.first, width);
        const T *restrict x = (const T *)x_RC + r * b.C + b.first;
        for (int64_t c = 0; c < width; c++) {
            A grad = LOAD(g + c);
            sum[c] += grad, product[c] += grad * (LOAD(x + c) - mean[c]);
        }
    }
    for (int64_t c = 0; c < width; c++) sums[c] += sum[c], sums[b.C + c] += product[c];
}

/* Value by value. Rows of contiguous tensors have one coefficient, those of channels-last tensors
   one for each value. */

static ALWAYS_INLINE A NAME(activate)(A z, struct activation act) {
    /* NaN stays; -inf * 0 must not become it. */
    A below = act.slope == 0 ? (z == z ? 0 : z) : z * (A)act.slope;
    return z > 0 ? (z > (A)act.top ? (A)act.top : z) : below;
}

CLONES static void NAME(normalize)(const void *x_all, const void *residual_all, void *y_all,
                                   struct shape d, int64_t first, int64_t end, const void *table,
                                   struct activation act) {
    const A *restrict center = table, *restrict scale = center + d.C, *restrict offset = scale + d.C;
    int64_t size = d.last ? d.C : d.S;
    for (int64_t row = first; row < end; row++) {
        const T *restrict x = (const T *)x_all + row * size;
        const T *restrict residual = residual_all ? (const T *)residual_all + row * size : NULL;
        T *restrict y = (T *)y_all + row * size;
#define EACH(VALUE) \
    for (int64_t i = 0; i < size; i++) STORE(y + i, VALUE)
#define FINISH(Z)                                                                       \
    if (act.is_identity && !residual) EACH(Z);                                          \
    else if (act.is_identity) EACH((Z) + LOAD(residual + i));                           \
    else if (!residual) EACH(NAME(activate)(Z, act));                                   \
    else EACH(NAME(activate)((Z) + LOAD(residual + i), act))
        if (d.last) {
            FINISH(CENTER(LOAD(x + i), center[i]) * scale[i] + offset[i]);
        } else {
            A m = center[row % d.C], s = scale[row % d.C], o = offset[row % d.C];
            FINISH(CENTER(LOAD(x + i), m) * s + o);
        }
#undef FINISH
#undef EACH
    }
}

/* dx = scale * g - slope * CENTER(x, mean) + offset */
CLONES static void NAME(apply)(const void *g_all, const void *x_all, void *dx_all, struct shape d,
                               int64_t first, int64_t end, const void *means, const void *table) {
    const A *restrict mean = means;
    const A *restrict scale = table, *restrict slope = scale + d.C, *restrict offset = slope + d.C;
    int64_t size = d.last ? d.C : d.S;
    for (int64_t row = first; row < end; row++) {
        const T *restrict g = (const T *)g_all + row * size;
        const T *restrict x = (const T *)x_all + row * size;
        T *restrict dx = (T *)dx_all + row * size;
        if (d.last) {
            for (int64_t i = 0; i < size; i++)
                STORE(dx + i,
                      scale[i] * LOAD(g + i) - slope[i] * CENTER(LOAD(x + i), mean[i]) + offset[i]);
        } else {
            A m = mean[row % d.C];
            A s = scale[row % d.C], sl = slope[row % d.C], o = offset[row % d.C];
            for (int64_t i = 0; i < size; i++)
                STORE(dx + i, s * LOAD(g + i) - sl * CENTER(LOAD(x + i), m) + o);
        }
    }
}

/* From a to b; exact at both ends. */
static ALWAYS_INLINE A NAME(lerp)(A a, A b, A factor) {
    return factor < (A)0.5 ? a + factor * (b - a) : b - (b - a) * (1 - factor);
}

/* Statistics of packed sums: mean and rstd, (2, C), and unless it is NULL the biased variance; the
   running ones move. */
static void NAME(statistics)(const double *totals, int64_t C, double eps, void *stats,
                             void *variance, struct running run) {
    A *mean = stats, *rstd = mean + C;
    A *running_mean = run.mean, *running_var = run.var, factor = (A)run.factor;
    double count = totals[0], divisor = count > 1 ? count : 1;
    double correction = count / (count > 2 ? count - 1 : 1);
    for (int64_t c = 0; c < C; c++) {
        double m = totals[1 + c] / divisor, var = totals[1 + C + c] / divisor - m * m;
        var = var < 0 ? 0 : var;
        mean[c] = (A)m;
        rstd[c] = (A)(1 / sqrt(var + eps));
        if (variance) ((A *)variance)[c] = (A)var;
        if (!running_mean) continue;
        running_mean[c] = NAME(lerp)(running_mean[c], mean[c], factor);
        running_var[c] = NAME(lerp)(running_var[c], (A)(var * correction), factor);
    }
}

/* The coefficients of `normalize`: center, scale and offset, (3, C).

   center = mean, rounded      scale = weight * rstd
   offset = bias - scale * CENTER(mean, center), of the mean that is not rounded */
static void NAME(normalize_coefficients)(const double *totals, int64_t C, const void *stats,
                                         const void *weight, const void *bias, void *table) {
    const A *mean = stats, *rstd = mean + C;
    A *center = table, *scale = center + C, *offset = scale + C;
    double divisor = totals[0] > 1 ? totals[0] : 1;
    for (int64_t c = 0; c < C; c++) {
        double rest = CENTER(totals[1 + c] / divisor, mean[c]);
        center[c] = mean[c];
        scale[c] = weight ? rstd[c] * ((const A *)weight)[c] : rstd[c];
        offset[c] = (A)((bias ? ((const A *)bias)[c] : 0) - rest * scale[c]);
    }
}

/* The coefficients of `apply`: scale, slope and offset, (3, C).

   scale = weight * rstd      slope = scale * rstd * sum_g_xhat / n
   offset = slope * CENTER(mean, mean) - scale * sum_g / n */
static void NAME(apply_coefficients)(const void *stats, double count, int64_t C,
                                     const void *weight, const double *sums, void *table) {
    const A *mean = stats, *rstd = mean + C;
    A *scale = table, *slope = scale + C, *offset = slope + C;
    for (int64_t c = 0; c < C; c++) {
        scale[c] = weight ? rstd[c] * ((const A *)weight)[c] : rstd[c];
        slope[c] = (A)(sums[C + c] / count * rstd[c] * scale[c]);
        offset[c] = (A)((double)slope[c] * CENTER(mean[c], mean[c]) - scale[c] * sums[c] / count);
    }
}

/* Sums of g * (x - mean) to sums of g * xhat; rounded, they are the gradients. */
static void NAME(finish_gradients)(const void *stats, int64_t C, double *sums, void *gradients) {
    const A *rstd = (const A *)stats + C;
    A *grad_bias = gradients, *grad_weight = grad_bias + C;
    for (int64_t c = 0; c < C; c++) {
        sums[C + c] *= rstd[c];
        grad_bias[c] = (A)sums[c];
        grad_weight[c] = (A)sums[C + c];
    }
}

static const struct kernels NAME(kernels) = {
    sizeof(A), NAME(rows_moments), NAME(chunk_moments), NAME(rows_gradients),
    NAME(chunk_gradients), NAME(normalize), NAME(apply), NAME(statistics),
    NAME(normalize_coefficients), NAME(apply_coefficients), NAME(finish_gradients),
};

#undef LANES
#undef SUM_OF

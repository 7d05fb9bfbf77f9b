// y = x W^T * scales for few rows x, with W in INT8 or FP8 (e4m3), row by row, and a scale for each output.
// Beside small_batch.cuh's the host defines FP8 as 0 or 1; for a block of threads, which has 16 outputs, STAGES groups under
// way per warp.
#define XS (16 * ROWS)  // in 16 bytes: a group of x, and below one of x and of the weights
#define STAGE (XS + 128)
// Where 16 bytes lie, so that 8 threads read from different banks: of x, and of the weights.
#define OF_X(row, k) ((row) * 16 + ((k) ^ (row) % 2))
#define OF_W(row, k) ((row) * 8 + ((k) ^ (row) % 2 * 4))

// Two of four weights as bf16: the first two or the last.
__device__ __forceinline__ u32 pair(u32 word, int last) {
#if FP8
    // Sign, exponent and mantissa go to where bf16 has them; the exponents differ by 120.
    const u32 bytes = __byte_perm(word, 0, last ? 0x3424 : 0x1404);
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r)
        : "r"((bytes & 0x80008000) | (bytes >> 4 & 0x07F007F0)), "r"(0x7B807B80), "r"(0x80008000));
    return r;
#else
    // 0x4B000000 | b is 2^23 + b as a float; what is left is exact in its upper half.
    word ^= 0x80808080;
    const float a = __uint_as_float(__byte_perm(word, 0x4B000000, last ? 0x7442 : 0x7440)) - 8388736.f;
    const float b = __uint_as_float(__byte_perm(word, 0x4B000000, last ? 0x7443 : 0x7441)) - 8388736.f;
    return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
eight_bit_product(const uint4 *x, const uint4 *w, const float *scales, unsigned short *y, int rows, int n) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // The last rows may overlap those before: both blocks write the same values.
    const int first = min((int)blockIdx.x * ROWS, rows - ROWS), n16 = blockIdx.y * 16;
    uint4 *ring = shared + warp * STAGES * STAGE;
    x += first * KO * 16 + warp * 16;
    w += (size_t)n16 * KO * 8 + warp * 8;
    scales += n16;
    y += (size_t)first * n + n16;

    auto fetch = [&](int i) {
        uint4 *to = ring + i % STAGES * STAGE;
        if (HAS(i)) {
#pragma unroll
            for (int c = lane; c < 128; c += 32)
                copy(to + XS + OF_W(c / 8, c % 8), w + (size_t)(c / 8) * KO * 8 + i * WARPS * 8 + c % 8);
#pragma unroll
            for (int c = lane; c < XS; c += 32)
                copy(to + OF_X(c / 16, c % 16), x + c / 16 * KO * 16 + i * WARPS * 16 + c % 16);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) fetch(i);

    float d[TILES][2][4] = {};  // two, for chains half as long
#pragma unroll 1
    for (int i = 0; HAS(i); i++) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
        __syncwarp();
        const uint4 *from = ring + i % STAGES * STAGE;
        // A product sums over its inputs in any order. So a thread takes 16 that lie together, of two outputs and a row.
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int k = lane % 4 + 4 * h;
            uint4 b[TILES][2];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                // x is operand B. Columns beyond its rows repeat the last.
                const int row = ROWS > 1 ? min(t * 8 + lane / 4, ROWS - 1) : 0;
                b[t][0] = from[OF_X(row, 2 * k)];
                b[t][1] = from[OF_X(row, 2 * k + 1)];
            }
            const uint4 upper = from[XS + OF_W(lane / 4, k)], lower = from[XS + OF_W(8 + lane / 4, k)];
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const u32 u = (&upper.x)[s], l = (&lower.x)[s];
                const u32 a[4] = {pair(u, 0), pair(l, 0), pair(u, 1), pair(l, 1)};
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const u32 *v = &b[t][s / 2].x + s % 2 * 2;
                    multiply(d[t][h], a, v[0], v[1]);
                }
            }
        }
        __syncwarp();
        fetch(i + STAGES);
    }
    // Each warp's sums, at the start of its ring, which is used up: an output of all rows, and then the next.
    float *sums = (float *)shared;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int output = c / 2 * 8 + lane / 4, row = t * 8 + lane % 4 * 2 + c % 2;
            if (row < ROWS) sums[warp * STAGES * STAGE * 4 + output * ROWS + row] = d[t][0][c] + d[t][1][c];
        }
    __syncthreads();
#pragma unroll 1
    for (int o = threadIdx.x; o < 16 * ROWS; o += WARPS * 32) {
        const int row = o / 16, output = o % 16;
        float t = 0;
        for (int i = 0; i < WARPS; i++) t += sums[i * STAGES * STAGE * 4 + output * ROWS + row];
        t *= scales[output];
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y[(size_t)row * n + output]) : "f"(t));
    }
}

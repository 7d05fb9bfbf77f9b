// y = x W^T * scales for a small batch x, with W in INT8 or FP8 (e4m3), row-major, and a scale per output.
// In addition to small_batch.cuh's definitions, the host defines FP8 as 0 or 1, and STAGES groups in flight per warp. A
// thread block has 16 outputs.
#define XS (16 * ROWS)  // in units of 16 bytes: a group of x; STAGE adds a group of weights
#define STAGE (XS + 128)
// Index of 16 bytes of x and of the weights, swizzled so that 8 threads read from different banks.
#define OF_X(row, k) ((row) * 16 + ((k) ^ (row) % 2))
#define OF_W(row, k) ((row) * 8 + ((k) ^ (row) % 2 * 4))

// Two of four weights as bf16: the first two or the last two.
__device__ __forceinline__ u32 pair(u32 word, int last) {
#if FP8
    // Move sign, exponent and mantissa to their positions in bf16; the exponent biases differ by 120.
    const u32 bytes = __byte_perm(word, 0, last ? 0x3424 : 0x1404);
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r)
        : "r"((bytes & 0x80008000) | (bytes >> 4 & 0x07F007F0)), "r"(0x7B807B80), "r"(0x80008000));
    return r;
#else
    // 0x4B000000 | b is 2^23 + b as a float; the difference is exact in its upper half.
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
    // The last rows may overlap earlier ones; both thread blocks write the same values.
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

    float d[TILES][2][4] = {};  // two accumulators, for dependency chains half as long
#pragma unroll 1
    for (int i = 0; HAS(i); i++) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
        __syncwarp();
        const uint4 *from = ring + i % STAGES * STAGE;
        // A product may sum over its inputs in any order, so a thread reads 16 contiguous ones, of two outputs and a row.
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int k = lane % 4 + 4 * h;
            uint4 b[TILES][2];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                // x is operand B. Columns beyond its rows repeat the last one.
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
    // Each warp's sums, at the start of its ring, which is no longer needed: all rows of an output, then the next output.
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

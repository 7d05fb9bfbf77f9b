// y = x W^T for a small batch x, with W in 4 bits, in the layout of torch's `_weight_int4pack_mm`, in groups of 128.
// In addition to small_batch.cuh's definitions, the host defines KOP groups as stored; per thread block, RB blocks of 8
// outputs, and STAGES groups in flight per warp; and BLOCKS thread blocks per multiprocessor.
#define COLS (ROWS > 1 ? 2 : 1)  // rows of 8 that a thread gets; one row counts once
#define XS (16 * ROWS)  // in units of 16 bytes: a group of x; STAGE adds a group of scales and of weights
#define STAGE (XS + 2 * RB + 32 * RB)

// Index of 16 bytes of x, swizzled so that 8 rows are read from different banks.
#define SWIZZLED(row, k) ((row) * 16 + ((k) ^ (row) % 8))

// Two weights as bf16 without a conversion: 0x4300 | q is 128 + q.
__device__ __forceinline__ u32 pair(u32 word, int shift) {
    u32 r;
    asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(r) : "r"(word >> shift), "r"(0x43004300));
    return r;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
int4_product(const uint4 *x, const uint4 *w, const uint4 *sz, unsigned short *y, int rows, int n) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // The last thread blocks may overlap earlier ones; both write the same values.
    const int first = min((int)blockIdx.x * ROWS, rows - ROWS), n8 = min((int)blockIdx.y * RB, n / 8 - RB);
    uint4 *ring = shared + warp * STAGES * STAGE;
    x += first * KO * 16 + warp * 16;
    y += (size_t)first * n + n8 * 8;
    w += ((size_t)n8 * KOP + warp) * 32 + lane;
    sz += (size_t)warp * (n / 4) + n8 * 2 + lane;

    auto fetch = [&](int i) {
        uint4 *to = ring + i % STAGES * STAGE;
        if (HAS(i)) {
#pragma unroll
            for (int r = 0; r < RB; r++)
                copy(to + XS + 2 * RB + r * 32 + lane, w + (r * KOP + i * WARPS) * 32);
            if (lane < 2 * RB) copy(to + XS + lane, sz + (size_t)(i * WARPS) * (n / 4));
#pragma unroll
            for (int c = lane; c < XS; c += 32) {
                const int row = c / 16, k = c % 16;
                copy(to + SWIZZLED(row, k), x + row * KO * 16 + i * WARPS * 16 + k);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) fetch(i);

    float acc[RB][TILES][COLS] = {};
#pragma unroll 1
    for (int i = 0; HAS(i); i++) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
        __syncwarp();
        const uint4 *from = ring + i % STAGES * STAGE;
        const u32 *scale = (const u32 *)(from + XS) + lane / 4;
        u32 b[TILES][16];
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            // x is operand B. Columns beyond its rows repeat the last one.
            const int row = ROWS > 1 ? min(t * 8 + lane % 8, ROWS - 1) : 0;
#pragma unroll
            for (int j = 0; j < 16; j += 4)
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                    : "=r"(b[t][j]), "=r"(b[t][j + 1]), "=r"(b[t][j + 2]), "=r"(b[t][j + 3])
                    : "r"((u32)__cvta_generic_to_shared(from + SWIZZLED(row, j + lane / 8))));
        }
        float sum[TILES][COLS];
        // Operand A has 16 rows, two blocks of W. Block RB is all ones, which gives the sum of x.
#pragma unroll
        for (int r = RB & ~1; r >= 0; r -= 2) {
            uint4 q[2] = {};
            float d[TILES][2][4] = {};  // two accumulators, for dependency chains half as long
#pragma unroll
            for (int e = 0; e < 2 && r + e < RB; e++) q[e] = from[XS + 2 * RB + (r + e) * 32 + lane];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                u32 a[4];
#pragma unroll
                for (int p = 0; p < 4; p++)
                    a[p] = r + p % 2 >= RB ? 0x3F803F80 : pair((&q[p % 2].x)[j / 2], j % 2 * 8 + p / 2 * 4);
#pragma unroll
                for (int t = 0; t < TILES; t++) multiply(d[t][j % 2], a, b[t][2 * j], b[t][2 * j + 1]);
            }
#pragma unroll
            for (int tc = 0; tc < TILES * COLS; tc++) {
                const int t = tc / COLS, c = tc % COLS;
                if (r + 1 >= RB) sum[t][c] = d[t][0][2 + c] + d[t][1][2 + c];
#pragma unroll
                for (int e = 0; e < 2 && r + e < RB; e++) {
                    const u32 s = scale[(r + e) * 8];  // two bf16, scale and zero point, each the upper half of a float
                    const float q8 = d[t][0][2 * e + c] + d[t][1][2 * e + c] - (128 + 8) * sum[t][c];
                    acc[r + e][t][c] += __uint_as_float(s << 16) * q8 + __uint_as_float(s & 0xFFFF0000) * sum[t][c];
                }
            }
        }
        __syncwarp();
        fetch(i + STAGES);
    }
    // Each warp's sums, at the start of its ring, which is no longer needed: all rows of an output, then the next output.
    float *sums = (float *)shared;
#pragma unroll
    for (int r = 0; r < RB; r++)
#pragma unroll
        for (int tc = 0; tc < TILES * COLS; tc++) {
            const int t = tc / COLS, c = tc % COLS, row = t * 8 + lane % 4 * 2 + c;
            if (row < ROWS) sums[warp * STAGES * STAGE * 4 + (r * 8 + lane / 4) * ROWS + row] = acc[r][t][c];
        }
    __syncthreads();
#pragma unroll 1
    for (int o = threadIdx.x; o < RB * 8 * ROWS; o += WARPS * 32) {
        const int row = o / (RB * 8), output = o % (RB * 8);
        float t = 0;
        for (int i = 0; i < WARPS; i++) t += sums[i * STAGES * STAGE * 4 + output * ROWS + row];
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y[(size_t)row * n + output]) : "f"(t));
    }
}

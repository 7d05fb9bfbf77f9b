// y = W x for one row x, with W in 4 bits, stored as torch's `_weight_int4pack_mm` wants it, in groups of 128.
// The host defines KO = K / 128 groups to read, KOP groups as stored, RB blocks of 8 outputs per block of threads,
// WARPS among which the groups are shared out, STAGES groups under way per warp, BLOCKS per multiprocessor.
typedef unsigned int u32;
#define STAGE (16 + 2 * RB + 32 * RB)  // in 16 bytes: a group of x, of the scales and of the weights
// Has a warp an i-th group? It takes the groups warp, warp + WARPS, warp + 2 * WARPS, ...
#define HAS(i) ((i) < KO / WARPS || ((i) == KO / WARPS && warp < KO % WARPS))

// Asynchronous: reads under way take no registers, and complete in order.
__device__ __forceinline__ void copy(uint4 *to, const uint4 *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
        :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
// Two weights as bf16 without a conversion: 0x4300 | q is 128 + q.
__device__ __forceinline__ u32 pair(u32 word, int shift) {
    u32 r;
    asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(r) : "r"(word >> shift), "r"(0x43004300));
    return r;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
int4_product(const uint4 *x, const uint4 *w, const uint4 *sz, unsigned short *y, int n) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // The last block may overlap the one before: both write the same values.
    const int n8 = min((int)blockIdx.x * RB, n / 8 - RB);
    uint4 *ring = shared + warp * STAGES * STAGE;
    x += warp * 16 + lane;
    w += ((size_t)n8 * KOP + warp) * 32 + lane;
    sz += (size_t)warp * (n / 4) + n8 * 2 + lane;

    auto fetch = [&](int i) {
        uint4 *to = ring + i % STAGES * STAGE + lane;
        if (HAS(i)) {
#pragma unroll
            for (int r = 0; r < RB; r++)
                copy(to + 16 + 2 * RB + r * 32, w + (r * KOP + i * WARPS) * 32);
            if (lane < 2 * RB) copy(to + 16, sz + (size_t)(i * WARPS) * (n / 4));
            if (lane < 16) copy(to, x + i * WARPS * 16);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) fetch(i);

    float acc[RB] = {};
#pragma unroll 1
    for (int i = 0; HAS(i); i++) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
        __syncwarp();
        const uint4 *from = ring + i % STAGES * STAGE;
        const u32 *scale = (const u32 *)(from + 16) + lane / 4;
        u32 b[16];
#pragma unroll
        for (int j = 0; j < 16; j += 4)  // x is operand B, the same in all its 8 columns
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                : "=r"(b[j]), "=r"(b[j + 1]), "=r"(b[j + 2]), "=r"(b[j + 3])
                : "r"((u32)__cvta_generic_to_shared(from + j + lane / 8)));
        float sum;
        // Operand A has 16 rows, two blocks of W. Block RB is all ones: it yields the sum of x.
#pragma unroll
        for (int r = RB & ~1; r >= 0; r -= 2) {
            uint4 q[2] = {};
            float d[2][4] = {};  // two, for chains half as long
#pragma unroll
            for (int e = 0; e < 2 && r + e < RB; e++) q[e] = from[16 + 2 * RB + (r + e) * 32 + lane];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                u32 a[4];
#pragma unroll
                for (int p = 0; p < 4; p++)
                    a[p] = r + p % 2 >= RB ? 0x3F803F80 : pair((&q[p % 2].x)[j / 2], j % 2 * 8 + p / 2 * 4);
                float *t = d[j % 2];
                asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                    : "+f"(t[0]), "+f"(t[1]), "+f"(t[2]), "+f"(t[3])
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * j]), "r"(b[2 * j + 1]));
            }
            if (r + 1 >= RB) sum = d[0][2] + d[1][2];
#pragma unroll
            for (int e = 0; e < 2 && r + e < RB; e++) {
                const u32 s = scale[(r + e) * 8];  // two bf16, scale and zero point, each the upper half of a float
                acc[r + e] += __uint_as_float(s << 16) * (d[0][2 * e] + d[1][2 * e] - (128 + 8) * sum)
                            + __uint_as_float(s & 0xFFFF0000) * sum;
            }
        }
        __syncwarp();
        fetch(i + STAGES);
    }
    float *sums = (float *)shared;  // each warp's at the start of its ring, which is used up
#pragma unroll
    for (int r = 0; r < RB; r++)
        if (lane % 4 == 0) sums[warp * STAGES * STAGE * 4 + r * 8 + lane / 4] = acc[r];
    __syncthreads();
    if (threadIdx.x < RB * 8) {
        float t = 0;
        for (int i = 0; i < WARPS; i++) t += sums[i * STAGES * STAGE * 4 + threadIdx.x];
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y[n8 * 8 + threadIdx.x]) : "f"(t));
    }
}

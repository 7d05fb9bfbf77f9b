// Shared by the small-batch kernels. The host defines KO = K / 128 groups to read and, per thread block, ROWS of x and
// WARPS, which divide the groups among them.
typedef unsigned int u32;
#define TILES ((ROWS + 7) / 8)  // a tensor core multiplies 8 rows at once
// Whether a warp has an i-th group. Its groups are warp, warp + WARPS, warp + 2 * WARPS, ...
#define HAS(i) ((i) < KO / WARPS || ((i) == KO / WARPS && warp < KO % WARPS))

// Asynchronous: reads in flight use no registers, and complete in order.
__device__ __forceinline__ void copy(uint4 *to, const uint4 *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
        :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
// c += a b: 16 outputs of w, 16 inputs, 8 rows of x.
__device__ __forceinline__ void multiply(float *c, const u32 *a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

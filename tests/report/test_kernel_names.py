"""Kernel names as torch's profiler reports them, and as sentences show them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report.kernel_names import short_kernel_name


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("awq_gemm_kernel", "awq_gemm_kernel"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "nvjet_hsh_64x8_64x16_4x1_v_bz_TNT"),
        ("void kgemm_4bit_inference_naive<__half, 128, 16>(int, float*)", "kgemm_4bit_inference_naive"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>, "
            "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul>)",
            "vectorized_elementwise_kernel",
        ),
        (
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_tn_align8>"
            "(cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_tn_align8::Params)",
            "cutlass_80_wmma_tensorop_f16_s161616gem…",
        ),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::Fwd<int> > >(int)", "enable_sm90"),
        (
            "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __half, float, "
            "cublasGemvParamsEx<int, cublasGemvTensorStridedBatched<__half const> > >(int)",
            "gemvx::kernel",
        ),
        ("void (anonymous namespace)::softmax_warp_forward<float, 8>(float*)", "softmax_warp_forward"),
        ("void marlin::Marlin<__half, 256, (marlin::Mode)1>(int4 const*)", "Marlin"),
        ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kern", "elementwise_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("Memset (Device)", "Memset"),
        (
            "triton_red_fused__unsafe_view_mm_mul_silu_t_view_11",
            "triton_red_fused__unsafe_view_mm_mul_si…",
        ),
    ],
)
def test_short_kernel_names(name: str, short: str) -> None:
    assert short_kernel_name(name) == short


@given(st.text(alphabet="abK<>():, _2", min_size=1, max_size=120))
def test_any_name_is_shortened(name: str) -> None:
    assert len(short_kernel_name(name)) <= 40

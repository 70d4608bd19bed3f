"""The host shim of CUDA C++ itself: small kernels, right and wrong ones."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import host_cuda
import pytest
import torch

from vidkernels import cuda_source
from vidkernels.op import REQUIREMENTS

pytestmark = pytest.mark.skipif(host_cuda.why_not() is not None, reason=str(host_cuda.why_not()))

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void __launch_bounds__(64) scale(const TYPE* __restrict__ x, TYPE* y, float factor, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count + EXTRA) y[i] = TYPE(float(__ldg(x + i)) * factor);
}

// Reversed within a block, through shared memory.
extern "C" __global__ void reversed(const float* x, float* y) {
    __shared__ float tile[64];
    extern __shared__ float more[];
    tile[threadIdx.x] = x[threadIdx.x];
    more[threadIdx.x] = x[threadIdx.x];
#if BARRIERS
    __syncthreads();
#endif
    const int other = blockDim.x - 1 - threadIdx.x;
    y[threadIdx.x] = 0.5f * (tile[other] + more[other]);
}

extern "C" __global__ void uneven(float* y) {
    if (threadIdx.x % 2) __syncwarp();
    __syncthreads();
    y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void overflows(float* y) {
    extern __shared__ float more[];
    more[threadIdx.x + 1] = y[threadIdx.x];
}

extern "C" __global__ void warp_sums(const int* x, int* y) {
    int sum = x[threadIdx.x];
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    const int up = __shfl_up_sync(~0u, int(threadIdx.x), 1), down = __shfl_down_sync(~0u, int(threadIdx.x), 1);
    const int lane = threadIdx.x % 32;
    const bool shifted = up == int(threadIdx.x) - (lane > 0) && down == int(threadIdx.x) + (lane < 31);
    y[threadIdx.x] = __all_sync(~0u, shifted) ? sum : -1;
}

// Every block writes its rank to every other's shared memory.
extern "C" __global__ void ranks(int* y) {
    extern __shared__ int seen[];
    __shared__ unsigned own;
    const unsigned rank = host_cuda::cluster_rank();
    for (unsigned other = threadIdx.x; other < CLUSTER; other += blockDim.x)
        *host_cuda::remote_shared(seen + rank, other) = rank;
    if (threadIdx.x == 0) own = rank;
    host_cuda::cluster_arrive();
#if BARRIERS
    host_cuda::cluster_wait();
#endif
    const int wrong = 100 * (own != rank);
    for (unsigned i = threadIdx.x; i < CLUSTER; i += blockDim.x) y[blockIdx.x * CLUSTER + i] = seen[i] + wrong;
}
"""

PRODUCT = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// D [16, 8] = A [16, 16] · B [8, 16]ᵀ.
extern "C" __global__ void product(const TYPE* a, const TYPE* b, float* d) {
    const int group = threadIdx.x / 4, pair = threadIdx.x % 4;
    auto two = [](const TYPE* p) { return *reinterpret_cast<const unsigned*>(p); };
    const unsigned fa[4] = {two(a + group * 16 + 2 * pair), two(a + (group + 8) * 16 + 2 * pair),
                            two(a + group * 16 + 2 * pair + 8), two(a + (group + 8) * 16 + 2 * pair + 8)};
    const unsigned fb[2] = {two(b + group * 16 + 2 * pair), two(b + group * 16 + 2 * pair + 8)};
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    host_cuda::mma_m16n8k16<TYPE>(sum, fa, fb);
    for (int i = 0; i < 4; ++i) d[(group + 8 * (i / 2)) * 8 + 2 * pair + i % 2] = sum[i];
}
"""


@pytest.fixture(autouse=True, scope="module")
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cu").write_text(SOURCE)
    (folder / "product.cu").write_text(PRODUCT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_source, "ROOT", folder)
        yield


def _run(entry: str, *args: object, grid: int = 1, block: int = 64, shared_bytes: int = 0, **options: object) -> None:
    macros = {"TYPE": "float", "EXTRA": 0, "BARRIERS": 1, "CLUSTER": options.get("cluster", 1), **options}
    host_cuda.run(f"kernels.cu:{entry}", (grid, 1, 1), *args, block=block, shared_bytes=shared_bytes, **macros)


@pytest.mark.parametrize("order", list(host_cuda.ORDERS))
@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "float"), (torch.float16, "__half"), (torch.bfloat16, "__nv_bfloat16")]
)
def test_rounds_as_torch_does(dtype: torch.dtype, name: str, order: str) -> None:
    x = torch.randn(100).to(dtype)
    y = torch.full_like(x, float("nan"))
    _run("scale", x, y, ctypes.c_float(1.7), ctypes.c_int(100), grid=2, TYPE=name, order=order)
    assert torch.equal(y, (x.float() * torch.tensor(1.7)).to(dtype))


def test_an_empty_grid_runs_nothing() -> None:
    host_cuda.run("missing.cu:none", (0, 1, 1), torch.empty(0), block=32)


@pytest.mark.parametrize("order", list(host_cuda.ORDERS))
def test_shared_memory(order: str) -> None:
    x, y = torch.randn(64), torch.empty(64)
    _run("reversed", x, y, shared_bytes=256, order=order)
    assert torch.equal(y, x.flip(0))


@pytest.mark.parametrize("order", list(host_cuda.ORDERS))
def test_a_missing_barrier_is_seen(order: str) -> None:
    x, y = torch.randn(64), torch.empty(64)
    _run("reversed", x, y, shared_bytes=256, order=order, BARRIERS=0)
    assert not torch.equal(y, x.flip(0))


def test_votes_and_shuffles() -> None:
    x = torch.randint(100, (64,), dtype=torch.int32)
    y = torch.empty_like(x)
    _run("warp_sums", x, y)
    assert torch.equal(y, x.view(2, 32).sum(1, dtype=torch.int32).repeat_interleave(32))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "__half"), (torch.bfloat16, "__nv_bfloat16")])
def test_matrix_product(dtype: torch.dtype, name: str) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.empty(16, 8)
    host_cuda.run("product.cu:product", (1, 1, 1), a, b, d, block=32, TYPE=name)
    torch.testing.assert_close(d, a.float() @ b.float().T)


@pytest.mark.parametrize("order", list(host_cuda.ORDERS))
def test_cluster(order: str) -> None:
    y = torch.full((8, 4), -1, dtype=torch.int32)
    _run("ranks", y, grid=8, block=32, cluster=4, shared_bytes=16, order=order)
    assert torch.equal(y, torch.arange(4, dtype=torch.int32).expand(8, 4))


def test_a_block_that_ended_has_no_shared_memory() -> None:
    with pytest.raises(RuntimeError, match=r"thread 0 of block \(1, 0, 0\): shared memory of a block that has ended"):
        _run("ranks", torch.empty(4, 4, dtype=torch.int32), grid=4, block=32, cluster=4, shared_bytes=16, BARRIERS=0)


def test_a_barrier_that_some_never_reach() -> None:
    with pytest.raises(RuntimeError, match="64 of 64 threads wait at a barrier that the others never reach"):
        _run("uneven", torch.empty(64))


@pytest.mark.parametrize(("sizes", "extra"), [((64, 48), 1), ((48, 64), 16)], ids=["write", "read"])
def test_memory_beyond_a_tensor(sizes: tuple[int, int], extra: int) -> None:
    x, y = torch.randn(sizes[0]), torch.zeros(sizes[1])
    with pytest.raises(RuntimeError, match=r"thread 48 of block \(0, 0, 0\) reaches beyond a tensor's memory"):
        _run("scale", x, y, ctypes.c_float(2.0), ctypes.c_int(48), EXTRA=extra)
    # The next launch is not disturbed.
    test_shared_memory("forward")


def test_memory_beyond_shared_bytes() -> None:
    with pytest.raises(RuntimeError, match="shared memory is written beyond shared_bytes"):
        _run("overflows", torch.ones(64), shared_bytes=256)


def test_arguments_are_compared_with_parameters() -> None:
    x = torch.empty(1)
    with pytest.raises(RuntimeError, match="argument 3 is i8, the parameter i4"):
        _run("scale", x, x, ctypes.c_float(1.0), ctypes.c_int64(1))
    with pytest.raises(RuntimeError, match="argument 2 is p4, the parameter f4"):
        _run("scale", x, x, x, ctypes.c_int(1))
    with pytest.raises(RuntimeError, match="2 arguments for 4 parameters"):
        _run("scale", x, x)


def test_text_that_does_not_compile() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)g\+\+ does not compile it:.*nonsense"):
        _run("scale", torch.empty(1), TYPE="nonsense")


def test_installed_lifts_requirements_for_a_cpu_alone() -> None:
    launch, needs = cuda_source.cuda, REQUIREMENTS["cuda_core"]
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with host_cuda.installed():
        assert cuda_source.cuda is not launch
        assert [REQUIREMENTS[need](cpu) for need in ("cuda_core", "sm_90")] == [None, None]
        assert REQUIREMENTS["cuda_core"](gpu) == needs(gpu)
        assert REQUIREMENTS["cuda"](cpu) is not None
    assert cuda_source.cuda is launch
    assert REQUIREMENTS["cuda_core"] is needs


def test_installed_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with host_cuda.installed():
        why = REQUIREMENTS["cuda_core"](torch.device("cpu"))
    assert why == "needs a CUDA device, or a C++ compiler: no-such-compiler is not on PATH"

"""Translates what the compiler writes for a CUDA device, on a machine without one.

A function is traced on the CPU, its graph is said to be on a device of compute capability 9.0, Inductor writes the
kernels, Triton translates them to machine code. Nothing runs: this finds what does not translate, such as a constant
that fits no index.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_heuristics
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

CUDA = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="compute capability 9.0",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
)
INTERFACE = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_properties": lambda device=None: PROPERTIES,
    "synchronize": lambda device=None: None,
    "get_compute_capability": lambda device=None: 90,
}
"""What the compiler asks of a device."""
PRETENDED = {
    **{f"torch.cuda.{name}": value for name, value in INTERFACE.items() if hasattr(torch.cuda, name)},
    "torch.cuda.get_device_capability": lambda device=None: (9, 0),
    "torch._subclasses.fake_tensor.init_gpu_context": lambda device: None,
    "torch.utils._triton.triton_hash_with_backend": lambda: "none",
}
"""What else is asked, by its place."""
_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''\n(.*?)''', device_str", re.DOTALL)
_DECORATORS = ("pointwise", "reduction", "persistent_reduction", "foreach", "split_scan")


def translated_kernels(function, inputs, folder):
    """Translate a function's kernels; raises what the compiler raises.

    Args:
        function: of tensors, without gradient; it may change its inputs.
        inputs: examples, on the CPU.
        folder: where the kernels' sources are written.

    Returns:
        Names of the kernels.
    """
    kernels = _KERNEL.findall(_written_for_cuda(function, inputs))
    for name, source in kernels:
        _translate(name, source, folder)
    return [name for name, _ in kernels]


def _written_for_cuda(function, inputs):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        examples = [mode.from_tensor(value, static_shapes=True) for value in inputs]
        pure = functionalize(function, remove="mutations_and_views")
        graph = make_fx(pure, decomposition_table=select_decomp_table())(*examples)

    def moved(tensor):
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(mode, like, CUDA)

    with ExitStack() as stack:
        for target, value in PRETENDED.items():
            stack.enter_context(mock.patch(target, value))
        for name, value in INTERFACE.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(value)))
            if hasattr(CudaInterface.Worker, name):
                stack.enter_context(mock.patch.object(CudaInterface.Worker, name, staticmethod(value)))
        for node in graph.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = tree_map_only(torch.Tensor, moved, node.meta["val"])
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
        graph.recompile()
        examples = [moved(example) for example in examples]
        lowering = GraphLowering(graph, example_inputs=examples, shape_env=mode.shape_env)
        stack.enter_context(V.set_graph_handler(lowering))
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(V.set_debug_handler(mock.MagicMock()))
        lowering.run(*examples)
        written, _ = lowering.codegen()
    return written.value


def _translate(name, source, folder):
    kept = {}

    def keeping(**settings):
        def decorate(kernel):
            kept.update(settings, kernel=kernel)
            return kernel

        return decorate

    path = folder / f"{name}.py"
    path.write_text(source)
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", return_value=None)
        )
        for decorator in _DECORATORS:
            stack.enter_context(mock.patch.object(triton_heuristics, decorator, keeping))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    kernel, meta = kept["kernel"], kept["triton_meta"]
    sizes = {
        key: 256 if key.startswith("X") else 1
        for key, kind in meta["signature"].items()
        if kind == "constexpr" and key not in meta["constants"]
    }
    constants = {
        (kernel.arg_names.index(key),): value for key, value in {**meta["constants"], **sizes}.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces defaults to come
        triton.compile(
            ASTSource(kernel, dict(meta["signature"]), constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 4},
        )

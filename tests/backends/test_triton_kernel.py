"""The Triton kernel without a GPU: its numbers under Triton's interpreter, and that it compiles for one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cases import Case, ToyModel, plan_of
from test_torch_kernels import chunks_of

torch = pytest.importorskip("torch")

from spectral_kv_core.codecs.registry import make_codec  # noqa: E402
from spectral_kv_torch import ops  # noqa: E402
from spectral_kv_torch.kernels import attention, device  # noqa: E402
from spectral_kv_torch.kernels.checked import CheckedStep  # noqa: E402

HERE = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (Linux: pip install triton)"
)


@needs_triton
def test_its_numbers_are_those_of_stock_operations():
    """In a process of its own: the interpreter must be chosen before triton is imported, and nothing else may get it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout and " skipped" not in result.stdout, result.stdout


@needs_triton
@pytest.mark.parametrize(
    "dtype, head_dim, capability, quantizer",
    [("bfloat16", 128, 90, "scalar"), ("float32", 256, 86, "scalar"), ("bfloat16", 64, 90, "trellis")],
)
def test_the_step_compiles_for_gpus_that_are_not_there(launches, dtype, head_dim, capability, quantizer):
    """With the arguments of a step, whose launches are recorded; the interpreter takes programs that no compiler does."""
    from spectral_kv_torch.kernels import triton_attention, triton_codes

    case = Case(0, head_dim, 1, 4)
    codec = make_codec(ops, plan_of(case.model, 8 if quantizer == "scalar" else 2, quantizer=quantizer), 0)
    queries, keys = (torch.zeros(1, heads, 1, head_dim, dtype=getattr(torch, dtype)) for heads in (4, 1))
    step, chunks = triton_attention.TritonStep(codec), chunks_of(codec, case, [16])
    made = launches([triton_codes, triton_attention], lambda: step(chunks, queries, keys, keys, 0.125))
    assert len(made) == (4 if quantizer == "trellis" else 3)
    assert_compiles(made, capability)


@needs_triton
@pytest.mark.parametrize("dtype, capability, quantizer", [("bfloat16", 90, "trellis"), ("float32", 80, "scalar")])
def test_decoding_compiles_for_gpus_that_are_not_there(launches, dtype, capability, quantizer):
    from spectral_kv_torch.kernels import triton_codes, triton_latents

    case = Case(0, 64, 2, 4)
    codec = make_codec(ops, plan_of(case.model, 2, "layer", "pre", quantizer=quantizer), 0)
    chunks, decode = chunks_of(codec, case, [144]), triton_latents.Latents(codec)
    made = launches([triton_codes, triton_latents], lambda: decode(chunks, getattr(torch, dtype)))
    assert len(made) == (2 if quantizer == "trellis" else 1)
    assert_compiles(made, capability)


@needs_triton
@pytest.mark.parametrize("dtype, capability", [("bfloat16", 90), ("float32", 80)])
def test_the_encoder_compiles_for_gpus_that_are_not_there(launches, dtype, capability):
    from spectral_kv_torch.kernels import triton_packing, triton_rope, triton_rounding

    model, dtype = ToyModel(80), getattr(torch, dtype)
    x, places = torch.zeros(2, 2, 33, 80, dtype=dtype), torch.arange(33, dtype=torch.int32)
    made = launches([triton_rope], lambda: triton_rope.rotate(x, model.rope, 5, True, dtype))
    assert_compiles(made, capability)
    made = launches([triton_rope], lambda: triton_rope.rotate(x, model.rope, places, False, dtype))
    assert_compiles(made, capability)
    codec = make_codec(ops, plan_of(model, 2, rounding="expected-attention"), 0)
    z, weights = codec.coefficients(*map(torch.from_numpy, model.sample(1, 32)), 4)
    call = z, weights, codec.gain, codec.time, codec.quantizers
    made = launches([triton_rounding], lambda: triton_rounding.round_in_time(*call))
    assert_compiles(made, capability)
    packer, codes = triton_packing.Packer(codec), codec.quantizers.quantize(z)
    made = launches([triton_packing], lambda: packer(codes))
    assert_compiles(made, capability)


@needs_triton
def test_layers_of_other_ranks_and_calls_of_other_lengths_need_no_other_kernels(launches):
    """A model has as many ranks as layers, and a compilation takes up to some seconds."""
    from spectral_kv_torch.kernels import (
        triton_attention,
        triton_codes,
        triton_latents,
        triton_packing,
        triton_rope,
        triton_rounding,
    )

    def variants(head_bits: float, layer_bits: float, tokens: int) -> tuple[list, list]:
        model, made = ToyModel(64), []
        head, layer = (
            make_codec(ops, plan_of(model, bits, *how, "expected-attention", "trellis"), 0)
            for bits, how in ((head_bits, ("head", "post")), (layer_bits, ("layer", "pre")))
        )
        case = Case(0, 64, 2, 4)
        queries, keys = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, tokens % 60, 64)
        step, chunks = triton_attention.TritonStep(head), chunks_of(head, case, [tokens])
        made += launches([triton_codes, triton_attention], lambda: step(chunks, queries, keys, keys, 0.125))
        decode, chunks = triton_latents.Latents(layer), chunks_of(layer, case, [tokens])
        made += launches([triton_codes, triton_latents], lambda: decode(chunks, torch.bfloat16))
        z, weights = layer.coefficients(*map(torch.from_numpy, model.sample(1, tokens)), 4)
        call = z, weights, layer.gain, layer.time, layer.quantizers
        made += launches([triton_rounding], lambda: triton_rounding.round_in_time(*call))
        packer, codes = triton_packing.Packer(layer), layer.quantizers.quantize(z)
        made += launches([triton_packing], lambda: packer(codes))
        x = torch.zeros(1, 2, tokens + 1, 64)
        made += launches([triton_rope], lambda: triton_rope.rotate(x, model.rope, tokens, True, torch.float32))
        return [(kernel.__name__, specialized(kernel, args)) for kernel, args, _ in made], [head.rank, layer.rank]

    (some, ranks), (others, other_ranks) = variants(0.9, 0.3, 32), variants(2, 6, 400)
    assert all(rank % 16 for rank in ranks) and not any(rank % 16 for rank in other_ranks)
    assert some == others


def specialized(kernel, args) -> list:
    """What decides, with the types of arguments, which variant of a kernel a launch takes."""
    found = []
    for parameter, value in zip(kernel.params, args, strict=True):
        if parameter.is_constexpr or isinstance(value, str):
            found.append(value)
        elif isinstance(value, torch.Tensor):
            found.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and not parameter.do_not_specialize:
            found.append((value == 1, value % 16 == 0))
    return found


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """What launches the kernels of modules while a function runs: (kernel, arguments, options) each."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: made.append((self.kernel, args, options))

    def record(modules, run) -> list:
        made.clear()
        from triton.runtime.jit import JITFunction

        for module in modules:
            for name, kernel in vars(module).copy().items():
                if isinstance(kernel, JITFunction):
                    monkeypatch.setattr(module, name, Recorder(kernel))
        run()
        monkeypatch.undo()
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        assert made
        return made.copy()

    return record


def assert_compiles(launches: list, capability: int) -> None:
    """Every one of `launches`, for an NVIDIA card of this capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, args, options in launches:
        signature, constants = {}, {}
        for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
            signature[parameter.name] = "constexpr" if parameter.is_constexpr else type_of(value)
            if parameter.is_constexpr:
                constants[(i,)] = value
        compiled = triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32), options)
        assert compiled.metadata.shared <= 99 * 1024  # what every card from Ampere on has for one program


def type_of(value) -> str:
    """Triton's name of the type of an argument."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype]
    return {int: "i32", float: "fp32", bool: "u1"}[type(value)]


@needs_triton
def test_which_cards_have_kernels(monkeypatch):
    card, codec = torch.device("cuda", 0), make_codec(ops, plan_of(Case(0, 64, 1, 2).model, 2), 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert device.runs_kernels(card) and not device.runs_kernels(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setenv("SPECTRALKV_KERNELS", "0")
        assert not device.runs_kernels(card)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not device.runs_kernels(card)
    monkeypatch.setattr(attention, "runs_kernels", lambda device: True)
    assert isinstance(attention._triton_step(codec), CheckedStep)
    trellis = make_codec(ops, plan_of(Case(0, 64, 1, 2).model, 2, quantizer="trellis"), 0)
    assert isinstance(attention._triton_step(trellis), CheckedStep)
    monkeypatch.setattr(codec, "head_dim", 512)
    assert attention._triton_step(codec) is None


def test_stock_operations_take_over_without_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not device.runs_kernels(torch.device("cuda", 0))


@pytest.mark.slow
def test_triton_is_imported_for_a_gpu_only():
    code = (
        "import sys, spectral_kv_torch.kernels; assert 'spectral_kv_torch.kernels.triton_attention' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

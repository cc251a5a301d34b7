"""SmolLM2-135M-Instruct on the PyTorch backend, with the shipped profile: bytes, quality and text that README claims."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from spectral_kv_core import cli  # noqa: E402
from spectral_kv_core.demo import demo_model_path  # noqa: E402
from spectral_kv_torch import load_model, make_prompt_cache  # noqa: E402
from spectral_kv_torch.generation import generate, plain_cache  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompt_text():
    return (files("spectral_kv_core") / "data" / "demo_prompt.txt").read_text()


@pytest.fixture(autouse=True)
def all_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    yield
    torch.set_num_threads(threads)


def test_quality_and_bytes_at_4_and_2_bits(tmp_path, capsys, prompt_text):
    """A real prefix of about a thousand tokens, the text after it scored: the limits of the first issue."""
    words = prompt_text.split(" ")
    (tmp_path / "prefix.txt").write_text(" ".join(words[:780]))
    (tmp_path / "after.txt").write_text(" " + " ".join(words[780:840]))
    rows = {}
    for bits in ("4", "2"):
        arguments = ["--model", "demo", "--backend", "torch", "--dtype", "float32", "--raw", "--json"]
        arguments += ["--prompt-file", str(tmp_path / "prefix.txt"), "--score-file", str(tmp_path / "after.txt")]
        assert cli.main(["generate", *arguments, "--bits", bits, "--max-tokens", "0"]) == 0
        rows[bits] = json.loads(capsys.readouterr().out)
    assert rows["4"]["prompt_tokens"] > 900 and rows["4"]["scored_tokens"] > 60
    assert rows["4"]["kl"] < 0.01 and rows["4"]["top1"] > 0.93
    assert rows["2"]["kl"] < 0.05 and rows["2"]["top1"] > 0.85
    # exact tokens are float32 here, the sealed ones take 2 and 4 bits
    assert rows["2"]["cache_bytes"] < 0.76 * rows["4"]["cache_bytes"] < 0.3 * rows["4"]["dense"]["cache_bytes"]


def test_greedy_text_at_4_bits_equals_the_plain_cache(prompt_text):
    """With `spectral-dense`; the tenth token of this answer is nearly a tie, which `spectral` turns at 6 bits still."""
    model, tokenizer = load_model(demo_model_path(), "float32")
    messages = [{"role": "user", "content": prompt_text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    texts = [
        generate(model, tokenizer, prompt, cache, 32, True, lambda token: None).tokens
        for cache in (plain_cache(model), make_prompt_cache(model, bits=4.0, method="spectral-dense"))
    ]
    assert texts[0] == texts[1]

"""One tiny random model of every family of transformers that is tried out, seeded, built in memory."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # large enough that attention matters
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
EXPERTS = {"first_k_dense_replace": 1, "n_shared_experts": 1}
DECODER = {"decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "d_model": 64}
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_hidden_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 2,
}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
TEXTS: dict[str, dict] = {  # parts of models that read images, which stand for no family
    "muse_glimmer_text": {
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "step3p5": {
        **WINDOWS,
        "share_expert_dim": 32,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_attention_groups": 2,
    },
}


def seeing(model_type: str, text: str, vision: dict = VISION, **more) -> dict:
    """Of a model that reads images too: the configuration of its text part is that of `text`."""
    given = {k: v for k, v in {**SIZES, **FAMILIES.get(text, TEXTS.get(text, MROPE))}.items() if v is not None}
    own = {k: v for k, v in given.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "type": model_type,
        "kind": "image",
        "bare": True,
        "text_config": {"model_type": text, **given},
        "vision_config": vision,
        **own,
        **more,
    }


# name -> what its configuration has beside SIZES; "type" where the name is not transformers' own; "kind" of its head
FAMILIES: dict[str, dict] = {
    # the same shape in all layers, attended as codes
    "llama": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bitnet": {},
    "cohere": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "flex_olmo": {},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "granite": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hyperclovax": {},
    "internlm3": {},
    "jais2": {},
    "laguna": {},
    "mellum": {},
    "minimax_m2": {},
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": {},
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": {},
    "sarvam_moe": {},
    "seed_oss": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "dots1": {**EXPERTS, "layer_types": ["full_attention"] * 3},
    # rotations that change at 64 tokens
    "llama, dynamic RoPE": {
        "type": "llama",
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "phi3, long RoPE": {
        "type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + i for i in range(8)],
            "original_max_position_embeddings": 64,
            "factor": 64.0,
        },
    },
    # layers without a rotation, or with another one
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "llama4_text": {
        "num_hidden_layers": 4,
        "attention_chunk_size": 32,
        "no_rope_layer_interval": 2,
        "intermediate_size_mlp": 96,
    },
    # windows
    "mistral, window": {"type": "mistral", "sliding_window": 8},
    "qwen2, window": {"type": "qwen2", "use_sliding_window": True, **WINDOWS},
    "afmoe": WINDOWS,
    "cohere2": WINDOWS,
    "cwm": WINDOWS,
    "exaone4": WINDOWS,
    "exaone_moe": WINDOWS,
    "gemma3_text": WINDOWS,
    "mimo_v2_flash": {
        **WINDOWS,
        "v_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
    },
    "ministral": WINDOWS,
    "modernbert-decoder": {"local_attention": 8},
    "olmo3": WINDOWS,
    # scores of their own kind
    "gemma2": {**WINDOWS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "vaultgemma": {**WINDOWS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gpt_oss": WINDOWS,
    "granite_swa": WINDOWS,
    "granitemoe_swa": WINDOWS,
    # layers that share keys and values, and layers of other widths
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text, keys as values": {
        "type": "gemma4_text",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "gemma4_text, shared": {
        "type": "gemma4_text",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
    },
    # latent attention: keys and values of other widths
    "deepseek_v2": {**LATENT, **EXPERTS},
    "deepseek_v3": {**LATENT, **EXPERTS},
    "deepseek_v32": {**LATENT, **EXPERTS, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "glm4_moe_lite": {**LATENT, **EXPERTS},
    "longcat_flash": {
        **LATENT,
        "num_layers": 2,
        "zero_expert_num": 1,
        "moe_topk": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
    },
    "minicpm3": LATENT,
    "youtu": LATENT,
    # older ones: positions that are learned, biases of scores, multi-query, attention code of their own
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8, "mp_num": 1},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96},
    "biogpt": {},
    "bloom": {},
    "mpt": {},
    "falcon": {"head_dim": None, "multi_query": True, "new_decoder_architecture": False},
    "falcon, alibi": {
        "type": "falcon",
        "head_dim": None,
        "multi_query": False,
        "alibi": True,
        "new_decoder_architecture": False,
    },
    "falcon, new": {"type": "falcon", "head_dim": None, "num_kv_heads": 2, "new_decoder_architecture": True},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 4096,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "ctrl": {},
    "xglm": {},
    "diffllama": {},
    "doge": {},
    "jetmoe": {"kv_channels": 16},
    "bert": {"is_decoder": True},
    "roformer": {"is_decoder": True},
    # linear attention and states
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    "granitemoehybrid": {**MAMBA, **LINEAR, "shared_intermediate_size": 32},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 8,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {**LATENT, **LINEAR, **EXPERTS, "linear_attn_config": None},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    "olmo_hybrid": {**DELTA, **LINEAR},
    "qwen3_next": {**DELTA, **LINEAR, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**DELTA, **LINEAR},
    "qwen3_5_moe_text": {**DELTA, **LINEAR, "shared_expert_intermediate_size": 32},
    "recurrent_gemma": {
        "attention_window_size": 8,
        "lru_width": 64,
        "block_types": ["recurrent", "attention", "recurrent"],
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "attention_head_dim": 32,
        "use_mem_rope": True,
    },
    "minimax": {},
    "mamba": {"state_size": 8, "time_step_rank": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 8},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {},
    # decoders of an encoder
    "bart": {**DECODER, **ENCODER},
    "bart, with encoder": {"type": "bart", "kind": "pair", **DECODER, **ENCODER},
    "mbart": {"kind": "pair", **DECODER, **ENCODER},
    "pegasus": {"kind": "pair", **DECODER, **ENCODER},
    "marian": {"kind": "pair", **DECODER, **ENCODER, "decoder_start_token_id": 2},
    "m2m_100": {"kind": "pair", **DECODER, **ENCODER},
    "t5": {"kind": "pair", **T5},
    "mt5": {"kind": "pair", **T5},
    "umt5": {"kind": "pair", **T5},
    "switch_transformers": {"kind": "pair", **T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
}


FAMILIES |= {
    "gemma3": seeing("gemma3", "gemma3_text", mm_tokens_per_image=4),
    "llava": seeing("llava", "llama"),
    "llava_next": seeing("llava_next", "llama"),
    "mistral3": seeing("mistral3", "ministral3"),
    "internvl": seeing("internvl", "qwen2"),
    "idefics3": seeing("idefics3", "llama"),
    "smolvlm": seeing("smolvlm", "llama"),
    "paligemma": seeing("paligemma", "gemma", projection_dim=64),
    "qwen2_vl": seeing("qwen2_vl", "qwen2_vl_text", QWEN_VISION),
    "qwen2_5_vl": seeing("qwen2_5_vl", "qwen2_5_vl_text", QWEN_VISION),
    "qwen3_vl": seeing("qwen3_vl", "qwen3_vl_text", QWEN_VISION),
    "qwen3_5": seeing("qwen3_5", "qwen3_5_text", QWEN_VISION),
    "aya_vision": seeing("aya_vision", "cohere2"),
    "muse_glimmer": seeing("muse_glimmer", "muse_glimmer_text", {**VISION, "pos_emb_height": 2, "pos_emb_width": 2}),
    "step3p7": seeing("step3p7", "step3p5"),
    "gemma4": seeing("gemma4", "gemma4_text"),
    "glm4v": seeing("glm4v", "glm4v_text", QWEN_VISION),
}


def tiny(name: str):
    """The tiny model of the family `name`."""
    given = dict(FAMILIES[name])
    given = given if given.pop("bare", False) else {**SIZES, **given}
    kind, model_type = given.pop("kind", "text"), given.pop("type", name)
    heads = {"text": AutoModelForCausalLM, "pair": AutoModelForSeq2SeqLM, "image": AutoModelForImageTextToText}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{k: v for k, v in given.items() if v is not None or k == "sliding_window"}
    )
    return heads[kind].from_config(config, dtype=torch.float32).eval()

"""One tiny random model of every family of mlx-lm that is tried out, seeded, built in memory."""

from __future__ import annotations

import importlib

import mlx.core as mx
from mlx.utils import tree_map

VOCABULARY = 256
SIZES = {
    "hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5, "norm_epsilon": 1e-5, "max_position_embeddings": 4096, "rope_theta": 1e4, "sliding_window": 8,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "use_bias": False,
    # mixtures of experts
    "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64, "decoder_sparse_step": 1, "norm_topk_prob": True,
    "mlp_only_layers": [], "n_routed_experts": 4, "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "moe_topk": 2, "num_shared_expert": 1,
    "use_mixed_mlp_moe": True, "num_dense_layers": 1,
}  # fmt: skip
GPT = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512}
LATENT = {
    "kv_lora_rank": 64, "q_lora_rank": 48, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
MAMBA = {
    "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_ssm": 512,
    "mamba_n_groups": 1, "mamba_proj_bias": False, "mamba_conv_bias": True,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
GRANITE = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.125,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
}
SLIDING, FULL = "sliding_attention", "full_attention"
ALTERNATING = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2}
GEMMA_4 = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "hidden_size_per_layer_input": 0,
           "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 0, "global_head_dim": 64}  # fmt: skip
LLAMA_4 = {"num_hidden_layers": 4, "intermediate_size_mlp": 128, "use_qk_norm": True, "attention_chunk_size": 32,
           "interleave_moe_layer_step": 2, "rope_scaling": None,
           "num_experts_per_tok": 1}  # fmt: skip
GEMMA_3N = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 256, "rope_local_base_freq": 1e4,
    "final_logit_softcapping": 30.0, "layer_types": [SLIDING, FULL] * 2, "activation_sparsity_pattern": [0.5, 0, 0, 0],
    "hidden_size_per_layer_input": 16, "altup_num_inputs": 2, "altup_coef_clip": 1.0, "altup_correct_scale": True,
    "altup_active_idx": 0, "laurel_rank": 8,
}  # fmt: skip

# by name the module of mlx_lm.models, and arguments beside SIZES
FAMILIES: dict[str, tuple[str, dict]] = {
    "AFM 7B": ("afm7", {"hidden_dim": 256, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2}),
    "AFMoE": ("afmoe", ALTERNATING),
    "Apertus": ("apertus", {"post_norm": False, "qk_norm": True, "hidden_act": "xielu"}),
    "Baichuan M1": ("baichuan_m1", {"sliding_window_layers": [0], "conv_window": 2}),
    "Bailing": ("bailing_moe", {}),
    "Bailing linear": ("bailing_moe_linear", {"num_hidden_layers": 4, "layer_group_size": 2, "group_norm_size": 1}),
    "Cohere": ("cohere", {}),
    "Cohere 2": ("cohere2", {"num_hidden_layers": 4, "sliding_window_pattern": 2}),
    "DBRX": (
        "dbrx",
        {
            "d_model": 256, "n_layers": 2, "n_heads": 4, "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4,
            "moe_top_k": 2}, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        },
    ),
    "DeepSeek": ("deepseek", {}),
    "DeepSeek 2": ("deepseek_v2", {**LATENT, "topk_method": "greedy", "rope_scaling": {"type": "yarn", "factor": 2.0,
        "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1}}),
    "DeepSeek 3": ("deepseek_v3", LATENT),
    "DeepSeek 3.2": ("deepseek_v32", {**LATENT, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 16}),
    "Dots": ("dots1", {}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "EXAONE": ("exaone", {"num_layers": 2}),
    "EXAONE 4": ("exaone4", {"num_hidden_layers": 4, "rope_scaling": None, "sliding_window_pattern": "LG"}),
    "EXAONE MoE": ("exaone_moe", {**ALTERNATING, "is_moe_layer": [False, True] * 2}),
    "Falcon H1": ("falcon_h1", MAMBA),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}),
    "Gemma 3": ("gemma3_text", {"num_hidden_layers": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 64}),
    "Gemma 3n": ("gemma3n", {"text_config": {**SIZES, **GEMMA_3N, "model_type": "gemma3n"}}),
    "Gemma 4": ("gemma4_text", GEMMA_4),
    "Gemma 4, K = V": ("gemma4_text", {**GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "Gemma 4, shared layers": (
        "gemma4_text", {**GEMMA_4, "num_hidden_layers": 6, "layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2}
    ),
    "Gemma 4, wide global heads": ("gemma4_text", {**GEMMA_4, "global_head_dim": 128}),
    "GLM": ("glm", {}),
    "GLM 4": ("glm4", {"partial_rotary_factor": 0.5}),
    "GLM 4 MoE": ("glm4_moe", {"rope_scaling": None, "use_qk_norm": True, "partial_rotary_factor": 0.5}),
    "GLM 4.7 Flash": ("glm4_moe_lite", LATENT),
    "GLM with sparse attention": ("glm_moe_dsa", {
        **LATENT, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 16, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "moe_layer_freq": 1, "rope_scaling": None, "rope_parameters": {"rope_theta": 1e4}}),
    "GPT-2": ("gpt2", GPT),
    "GPT BigCode": ("gpt_bigcode", {**GPT, "n_inner": 128, "multi_query": True}),
    "GPT-J": ("gptj", {**GPT, "n_head": 4, "rotary_dim": 32}),
    "GPT-NeoX": ("gpt_neox", {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
    "GPT-OSS": ("gpt_oss", {**ALTERNATING}),
    "Granite": ("granite", GRANITE),
    "Granite MoE": ("granitemoe", GRANITE),
    "Granite 4 hybrid": (
        "granitemoehybrid", {**GRANITE, **MAMBA, "num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2,
                             "position_embedding_type": "nope"}
    ),
    "Helium": ("helium", {}),
    "Hunyuan": ("hunyuan", {"use_qk_norm": True, "use_cla": False, "cla_share_factor": 2,
                            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}}),
    "Hunyuan, shared layers": ("hunyuan", {"use_qk_norm": True, "use_cla": True, "cla_share_factor": 2,
                            "num_hidden_layers": 4, "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}}),
    "Hunyuan dense": ("hunyuan_v1_dense", {}),
    "InternLM 2": ("internlm2", {"bias": False}),
    "InternLM 3": ("internlm3", {"bias": False}),
    "Jamba": ("jamba", {**MAMBA, "num_hidden_layers": 4, "attn_layer_offset": 1, "attn_layer_period": 2,
                        "expert_layer_offset": 1, "expert_layer_period": 2}),
    "Kimi K2.5": ("kimi_k25", {"text_config": {**SIZES, **LATENT, "model_type": "kimi_k2"}}),
    "Kimi Linear": ("kimi_linear", {**LATENT, "num_hidden_layers": 4, "model_max_length": 4096, "num_experts_per_token": 2,
                                    "linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2, 4],
                                    "num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4}}),
    "Klear": ("Klear", {}),
    "LFM2": ("lfm2", {"num_hidden_layers": 4, "conv_bias": False, "conv_L_cache": 3, "block_dim": 256,
                      "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
                      "layer_types": ["conv", FULL] * 2}),
    "LFM2 MoE": ("lfm2_moe", {"num_hidden_layers": 4, "use_expert_bias": False, "conv_bias": False, "conv_L_cache": 3,
                              "layer_types": ["conv", FULL] * 2}),
    "Lille": ("lille-130m", {**GPT, "block_size": 512, "n_kv_heads": 2}),
    "Llama": ("llama", {}),
    "Llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "Llama, sliding windows": ("llama", {**ALTERNATING}),
    "Llama 4": ("llama4", {"text_config": {**SIZES, **LLAMA_4, "model_type": "llama4_text"}}),
    "Llama 4 text": ("llama4_text", {**LLAMA_4, "no_rope_layers": [1, 1, 1, 0]}),
    "LongCat Flash": ("longcat_flash", {
        **LATENT, "attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 64, "zero_expert_num": 1, "num_layers": 2, "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True, "router_bias": False}),
    "Mamba": ("mamba", {"state_size": 16, "conv_kernel": 4, "use_conv_bias": True, "time_step_rank": 16}),
    "Mamba 2": ("mamba2", {"num_heads": 8, "head_dim": 64, "state_size": 16, "conv_kernel": 4, "n_groups": 1,
                           "use_conv_bias": True, "time_step_limit": (0.0, 100.0), "time_step_rank": 16}),
    "MiMo": ("mimo", {}),
    "MiMo V2 Flash": ("mimo_v2_flash", {
        "num_hidden_layers": 4, "hybrid_layer_pattern": [1, 0] * 2, "moe_layer_freq": [0, 1] * 2,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": True, "sliding_window_size": 8,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "layernorm_epsilon": 1e-5, "swa_rope_theta": 1e4,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "v_head_dim": 64, "swa_head_dim": 64,
        "swa_v_head_dim": 64, "partial_rotary_factor": 0.5}),
    "MiMo V2 Flash, narrow values": ("mimo_v2_flash", {
        "num_hidden_layers": 4, "hybrid_layer_pattern": [1, 0] * 2, "moe_layer_freq": [0, 1] * 2,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "sliding_window_size": 8,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "layernorm_epsilon": 1e-5, "swa_rope_theta": 1e4,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "v_head_dim": 32, "swa_head_dim": 64,
        "swa_v_head_dim": 32, "partial_rotary_factor": 0.5}),
    "MiniCPM": ("minicpm", {"dim_model_base": 256, "scale_depth": 1.4, "scale_emb": 2.0}),
    "MiniCPM 3": ("minicpm3", {**LATENT, "dim_model_base": 256, "scale_depth": 1.4, "scale_emb": 2.0,
                               "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096,
                                                "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}}),
    "MiniMax": ("minimax", {"rotary_dim": 32}),
    "Ministral 3": ("ministral3", {"rope_parameters": {
        "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}}),
    "Mistral 4": ("mistral4", {**LATENT, "rope_parameters": {
        "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}}),
    "Mixtral": ("mixtral", {}),
    "Muse Glimmer": ("muse_glimmer", {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2}),
    "Nanbeige": ("nanbeige", {}),
    "NanoChat": ("nanochat", {}),
    "Nemotron": ("nemotron", {"hidden_act": "relu2", "partial_rotary_factor": 0.5}),
    "Nemotron H": ("nemotron_h", {
        "hybrid_override_pattern": list("M-*-M*"), "mamba_num_heads": 8, "mamba_head_dim": 64, "mamba_proj_bias": False,
        "ssm_state_size": 16, "conv_kernel": 4, "n_groups": 1, "use_conv_bias": True}),
    "Nemotron NAS": ("nemotron-nas", {"num_hidden_layers": 3, "block_configs": [
        {"attention": {"n_heads_in_group": heads, "no_op": skip, "replace_with_linear": False},
         "ffn": {"ffn_mult": 0.5, "no_op": False, "replace_with_linear": False}}
        for heads, skip in ((2, False), (None, True), (2, False))]}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {**ALTERNATING}),
    "OLMo hybrid": ("olmo_hybrid", {
        **DELTA, "num_hidden_layers": 4, "linear_allow_neg_eigval": True, "layer_types": ["linear_attention", FULL] * 2}),
    "OLMoE": ("olmoe", {}),
    "OpenELM": ("openelm", {
        "num_transformer_layers": 3, "model_dim": 256, "ffn_dim_divisor": 32, "num_query_heads": [4, 8, 8],
        "num_kv_heads": [2, 2, 2], "ffn_multipliers": [0.5, 1.0, 1.0]}),
    "Phi": ("phi", {"partial_rotary_factor": 0.5}),
    "Phi 3": ("phi3", {}),
    "Phi 3, RoPE that switches at 64": ("phi3", {
        "original_max_position_embeddings": 64, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1 + i / 8 for i in range(32)]}}),
    "Phi MoE": ("phimoe", {"rope_scaling": {
        "type": "longrope", "original_max_position_embeddings": 4096, "short_factor": [1.0] * 32,
        "long_factor": [2.0] * 32, "short_mscale": 1.2, "long_mscale": 1.2}}),
    "Phixtral": ("phixtral", {"num_vocab": 256, "model_dim": 256, "num_heads": 4, "num_layers": 2, "rotary_dim": 32}),
    "PLaMo": ("plamo", {"n_shared_head": 2}),
    "PLaMo 2": ("plamo2", {"num_hidden_layers": 4, "hidden_size_per_head": 64, "mamba_num_heads": 4, "mamba_d_state": 16,
                           "full_attention_idx": [1, 3], "attention_window_size": 8}),
    "PLaMo 3": ("plamo3", {"num_hidden_layers": 4, "window_size": 8, "sliding_window_pattern": 2,
                           "sliding_window_interleave": 2}),
    "Qwen": ("qwen", {"kv_channels": 64}),
    "Qwen 2": ("qwen2", {}),
    "Qwen 2 MoE": ("qwen2_moe", {}),
    "Qwen 3": ("qwen3", {}),
    "Qwen 3 MoE": ("qwen3_moe", {}),
    "Qwen 3.5": ("qwen3_5", {"text_config": {**SIZES, **DELTA, "num_hidden_layers": 4, "full_attention_interval": 2,
                                             "num_experts": 0, "model_type": "qwen3_5_text"}}),
    "Qwen 3 Next": ("qwen3_next", {**DELTA, "num_hidden_layers": 4, "full_attention_interval": 2,
                                   "partial_rotary_factor": 0.25}),
    "RecurrentGemma": ("recurrent_gemma", {
        "num_hidden_layers": 4, "conv1d_width": 4, "logits_soft_cap": 30.0, "attention_window_size": 8,
        "block_types": ["recurrent", "attention"], "num_key_value_heads": 1}),
    "RWKV 7": ("rwkv7", {"a_low_rank_dim": 16, "v_low_rank_dim": 16, "gate_low_rank_dim": 16, "decay_low_rank_dim": 16}),
    "Seed": ("seed_oss", {"attention_out_bias": False}),
    "SmolLM 3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "Solar": ("solar_open", {"rope_scaling": None, "use_qk_norm": False, "partial_rotary_factor": 1.0}),
    "Spark 2.5": ("spark2_5", {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "rope_parameters": {
        SLIDING: {"rope_theta": 1e4}, FULL: {"rope_theta": 1e5, "partial_rotary_factor": 0.5}}}),
    "StableLM": ("stablelm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "StarCoder 2": ("starcoder2", {}),
    "Step 3.5": ("step3p5", {"num_hidden_layers": 4, "num_attention_groups": 2, "layer_types": [SLIDING, FULL] * 2,
        "moe_num_experts": 4, "moe_top_k": 2, "share_expert_dim": 64, "moe_layers_enum": "1,3",
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2}}),
    "Talkie": ("talkie", {}),
    "TeleChat 3": ("telechat3", {}),
    "Youtu": ("youtu_llm", LATENT),
}  # fmt: skip


def tiny(name: str):
    """The tiny model of the family `name`."""
    module_name, arguments = FAMILIES[name]
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    mx.random.seed(0)  # for what is not drawn below
    model = module.Model(module.ModelArgs.from_dict({"model_type": module_name, **SIZES, **arguments}))
    keys = iter(mx.random.split(mx.random.key(0), 2000))

    def draw(x):
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        if x.ndim < 2:
            return x + 0.1 * mx.random.normal(x.shape, key=next(keys))
        inputs = x.shape[-1] if x.shape[-1] > 1 else x.shape[-2]
        return inputs**-0.5 * mx.random.normal(x.shape, key=next(keys))

    model.update(tree_map(draw, model.parameters()))
    mx.eval(model.parameters())
    return model

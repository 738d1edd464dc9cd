"""Which keys of a ``config.json`` are understood, so that all others can be named.

Three kinds are known: keys that decide sizes or a choice here; keys that the engines' layers read and that change
neither; keys of no architecture. A key that is off (null, false, 0, empty) says nothing and is not named.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

# Read by fourfold.common.recipe.sizing or by the choices here.
SIZES = frozenset(
    """
    activation_situ_beta architectures attn_output_gate compress_ratios conv_kernel decoder_sparse_step
    dense_intermediate_size dspark_block_size dspark_markov_rank dspark_n_routed_experts dspark_noise_token_id
    dspark_num_experts_per_tok dspark_target_layer_ids dtype engram_head_dim engram_layer_ids engram_num_embeddings
    expert_dtype expert_intermediate_size experts_per_token ffn_hidden_size first_k_dense_replace
    full_attention_interval hc_mult head_dim hidden_act hidden_size hybrid_override_pattern index_head_dim index_n_heads
    index_source_layer_ids index_topk indexer_types intermediate_size kv_lora_rank kv_source_layer_ids layer_types
    layers_block_type linear_attn_config linear_conv_kernel_dim linear_head_dim linear_key_head_dim linear_num_heads
    linear_num_key_heads linear_num_value_heads linear_value_head_dim mamba_head_dim mamba_num_heads mamba_ssm_dtype
    mamba_ssm_cache_dtype max_position_embeddings max_sequence_length mla_use_output_gate mlp_hidden_act mlp_layer_types
    mlp_only_layers model_type moe_intermediate_size moe_latent_size moe_layer_freq moe_num_experts
    moe_shared_expert_intermediate_size moe_top_k mtp_num_hidden_layers n_groups n_layer n_mtp_layers n_routed_experts
    n_shared_experts num_attention_heads num_experts num_experts_per_tok num_experts_per_token num_hidden_layers
    num_key_value_heads num_kv_heads num_local_experts num_mtp_modules num_nextn_predict_layers num_shared_experts
    o_groups o_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim quantization_config compression_config
    routed_expert_hidden_size shared_expert_intermediate_size shared_intermediate_size sliding_window
    sparse_attention_config ssm_state_size tie_word_embeddings torch_dtype v_head_dim vision_config vocab_size auto_map
    """.split()
)
# Read by the engines' layers, without effect on sizes, layouts and flags: norms, positions, routing, activations.
COMPUTED = frozenset(
    """
    attention_bias candidate_block_size candidate_source_layer_id
    candidate_topk_blocks chunk_size compress_rope_theta expand hc_eps hc_sinkhorn_iters hidden_activation
    index_share_for_mtp_iteration index_skip_topk_offset index_topk_freq index_topk_pattern indexer_rope_interleave
    initial_context_length layer_norm_epsilon layernorm_epsilon mamba_hidden_act
    mamba_proj_bias max_window_layers mlp_bias moe_renormalize moe_router_activation_func moe_router_dtype
    moe_router_scaling_factor moe_shared_expert_overlap mla_use_nope n_group norm_eps norm_topk_prob num_expert_group
    num_hash_layers num_logits_to_keep output_gate_type partial_rotary_factor qk_head_dim qk_norm_type qkv_bias
    residual_in_fp32 rms_norm_eps rope_interleave rope_parameters rope_scaling rope_theta rotary_dim
    routed_scaling_factor rescale_prenorm_residual scoring_func swa_rope_theta swiglu_alpha
    swiglu_limit time_step_floor time_step_limit time_step_max time_step_min time_step_rank topk_group topk_method
    use_bias use_conv_bias use_gemma_norm use_grouped_topk use_mamba_kernels use_moe_router_bias use_mrope use_mtp
    use_qk_norm use_routing_bias use_sliding_window activation_situ_linear_beta latent_moe_use_norm
    mtp_use_dedicated_embeddings mtp_layers_block_type mtp_hybrid_override_pattern
    """.split()
)
# Of training, of text generation, of transformers itself, or of an encoder before the language model.
PLAIN = frozenset(
    """
    add_cross_attention bad_words_ids chunk_size_feed_forward cross_attention_hidden_size diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size ep_size exponential_decay_length_penalty finetuning_task id2label
    ignore_index is_decoder is_encoder_decoder label2id language_model_only length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences num_reward_heads prefix pretraining_tp
    problem_type process_image_mode projector_hidden_act projector_hidden_size pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate seq_aux suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript transformers_version typical_p
    use_bfloat16 use_cache audio_config begin_suppress_tokens multimodal_projector_bias vision_feature_layer
    vision_feature_select_strategy use_unified_vision_chunk fourfold transformers.js_config
    """.split()
)
_PLAIN_NAMES = re.compile(
    r"^_|_token_ids?$|_token_index$|_placeholder$|dropout|initializer|^output_(?!gate)|_loss|aux_loss|jitter|^(image|video"
    r"|vision|audio|img)_|_per_image$"
)


def unknown_traits(config: Mapping[str, Any]) -> list[str]:
    """What a flat configuration says that is not understood, a line each: key, value and the nearest known key."""
    known = SIZES | COMPUTED | PLAIN
    out = []
    for key, value in config.items():
        if key in known or _PLAIN_NAMES.search(key) or value in (None, False, 0, "", [], {}):
            continue
        near = difflib.get_close_matches(key, sorted(SIZES | COMPUTED), n=1, cutoff=0.75)
        hint = f"; it resembles {near[0]}" if near else ""
        out.append(f"{printable(key)}: {shortened(value)}{hint}")
    return out


def shortened(value: Any, most: int = 60) -> str:
    """A value as JSON, cut, without characters that a terminal acts on."""
    text = json.dumps(value, default=str)
    return text if len(text) <= most else f"{text[:most]}..."


def printable(text: str, most: int = 80) -> str:
    """A name from a file that may hold anything."""
    return "".join(char if char.isprintable() else "?" for char in text[:most])

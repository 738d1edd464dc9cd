"""Rows of `fourfold.common.compat` for the adapters of ``fourfold recipe check`` and ``rehearse``."""

from __future__ import annotations

from fourfold.common.seam import Seam, sglang, vllm

_MACHINE = "the engine resolves a configuration for a machine that is described to it"
_BUILD = "the engine builds a model's class for a configuration outside its workers"


RECIPES: tuple[Seam, ...] = (
    vllm("plugins:load_general_plugins", "a recipe's engine has its plugins"),
    vllm("utils.argparse_utils:FlexibleArgumentParser", "the parser that a recipe's arguments go to"),
    vllm("engine.arg_utils:EngineArgs.from_cli_args", "arguments to a configuration", ("args",)),
    vllm(
        "engine.arg_utils:EngineArgs.create_engine_config", "resolves as the server does", ("usage_context", "headless")
    ),
    vllm("engine.arg_utils:AsyncEngineArgs", "the server's arguments"),
    vllm("engine.arg_utils:get_type_hints", "which options take a mapping", ("type_hint",)),
    vllm("usage.usage_lib:UsageContext", "resolves as the server does"),
    vllm("config:SpeculativeConfig", "the keys of --speculative-config"),
    vllm("envs:environment_variables", "the variables that vLLM knows"),
    vllm("platforms.cuda:CudaPlatformBase", "the simulated machine", until=_MACHINE),
    vllm("platforms.interface:DeviceCapability", "the simulated machine", until=_MACHINE),
    vllm(
        "model_executor.models.registry:_run_in_subprocess",
        "asks for a model's class on the simulated machine",
        ("fn",),
        _MACHINE,
    ),
    vllm(
        "config.reasoning:ReasoningConfig.initialize_token_ids",
        "left out: a recipe's model has no tokenizer",
        ("model_config",),
        _MACHINE,
    ),
    vllm("reasoning:ReasoningParserManager", "whether there is such a parser"),
    vllm(
        "config.vllm:set_current_vllm_config",
        "builds a model's class to load a small checkpoint",
        ("vllm_config",),
        _BUILD,
    ),
    vllm(
        "config.speculative:SpeculativeConfig.apply_draft_overrides",
        "builds the class of its draft",
        ("vllm_config",),
        until=_BUILD,
    ),
    vllm(
        "distributed.parallel_state:init_distributed_environment",
        "groups of one rank, which layers ask for when they are built",
        ("world_size", "rank", "distributed_init_method", "local_rank", "backend"),
        _BUILD,
    ),
    vllm(
        "distributed.parallel_state:ensure_model_parallel_initialized",
        "groups of one rank",
        ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        _BUILD,
    ),
    vllm(
        "model_executor.model_loader.utils:initialize_model",
        "builds a model's class",
        ("vllm_config", "model_config"),
        _BUILD,
    ),
    vllm("v1.worker.workspace:init_workspace_manager", "what layers ask for", ("device",), _BUILD),
    sglang("plugins:load_plugins", "a recipe's engine has its plugins"),
    sglang("server_args:ServerArgs", "its parser, and arguments to a configuration"),
    sglang("environ:Envs", "the variables that SGLang knows"),
    sglang("environ:EnvField", "the variables that SGLang knows"),
    sglang("platforms.cuda:CudaSRTPlatform", "the simulated machine", until=_MACHINE),
    sglang("runtime_context:override_platform", "the simulated machine", until=_MACHINE),
    sglang("utils.common:get_device_memory_capacity", "the simulated machine's memory", ("device",), _MACHINE),
    sglang("utils.common:is_mnnvl_fabric_device", "the simulated machine's links", until=_MACHINE),
    sglang("runtime_context:publish", "builds a model's class to load a small checkpoint", ("server_args",), _BUILD),
    sglang("runtime_context:SpawnRanks", "one rank", until=_BUILD),
    sglang(
        "distributed.parallel_state:init_distributed_environment",
        "groups of one rank, which layers ask for when they are built",
        ("world_size", "rank", "local_rank", "distributed_init_method", "backend"),
        _BUILD,
    ),
    sglang("distributed.parallel_state:initialize_model_parallel", "groups of one rank", until=_BUILD),
    sglang("distributed.bootstrap:init_layer_runtime", "what layers ask for", ("model_config",), _BUILD),
    sglang("layers.dp_attention:initialize_dp_attention", "what layers ask for", ("server_args",), _BUILD),
    sglang("layers.moe.utils:initialize_moe_config", "what layers ask for", until=_BUILD),
    sglang("layers.quantization.fp4_utils:initialize_fp4_gemm_config", "what layers ask for", until=_BUILD),
    sglang("layers.quantization.fp8_utils:initialize_fp8_gemm_config", "what layers ask for", until=_BUILD),
    sglang("layers.rotary_embedding.rope_variant:DeepseekScalingRotaryEmbedding", "asks for a device", until=_BUILD),
    sglang("configs.load_config:LoadConfig", "how to load", until=_BUILD),
    sglang(
        "configs.model_config:ModelConfig.from_server_args",
        "the class of a model and of its draft",
        ("server_args", "model_path", "is_draft_model"),
        _BUILD,
    ),
    sglang(
        "model_loader.loader:_get_quantization_config",
        "how its weights are held",
        ("model_config", "load_config"),
        _BUILD,
    ),
    sglang(
        "model_loader.loader:_initialize_model",
        "builds a model's class",
        ("model_config", "load_config", "quant_config"),
        _BUILD,
    ),
)

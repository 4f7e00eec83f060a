"""Hugging Face's weights as other programs store them: names in wrappers, tensors that are no Llama's as they stand.

    python -c "from nanollama.checkpoint.spellings import plain; print(plain('_orig_mod.model.norm.weight'))"
    # model.norm.weight

A wrapper changes a name and no number, so it is taken off. What else is stored (quantised weights, a LoRA beside its
base, the empty or flat tensors of a sharded run) is refused, with what to get or save instead.
"""

import re

# Of torch.compile, FSDP and activation checkpointing, anywhere in a name; of DDP, DeepSpeed and peft, before it.
WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PLACED = re.compile(
    r"(?:module\.|base_model\.model\.)*(?:model\.)*((?:embed_tokens|layers|norm|rotary_emb|lm_head)\..*)"
)
QUANTIZED = "quantised weights of a Hugging Face folder are not read: get the bf16 weights, or a .gguf of this model"
STRANGE = (
    (
        r"\.(?:qweight|qzeros|g_idx|scales|(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\..*|SCB|weight_format"
        r"|[a-z]*_scale(?:_inv|_2)?|weight_packed|weight_shape|weight_zero_point|biases)$",
        f"is of a quantised model; {QUANTIZED}",
    ),
    (
        r"lora_|\.base_layer\.|modules_to_save",
        "is of a LoRA that was saved beside its base: merge it with peft (merge_and_unload), and save that",
    ),
    (r"\.bias$", "is a bias, which no Llama computed here has: without it this would be another model"),
    (
        r"^(?:model\.)?(?:tok_embeddings|output|layers\.\d+\.(?:attention|feed_forward|ffn_norm|attention_norm))\.",
        "has Meta's name, in a file of Hugging Face's: give the folder with params.json and consolidated.NN.pth",
    ),
    (
        r"qkv|gate_up|c_attn|\bwte\b|^transformer\.|query_key_value|\.sa_norm|\.mlp\.w\d",
        "has the name of another program: convert the model to Hugging Face's format with that program",
    ),
)


def plain(name: str) -> str:
    """The name that transformers gives the weight; another name as it is."""
    found = PLACED.fullmatch(WRAPPERS.sub("", name))
    if found is None:
        return name
    return found[1] if found[1].startswith("lm_head.") else f"model.{found[1]}"


def unknown(name: str) -> str:
    """What to say about a weight whose name no Llama has."""
    bare = WRAPPERS.sub("", name)
    what = next((what for pattern, what in STRANGE if re.search(pattern, bare)), "is unknown: no Llama has it")
    return f"weight {name} {what}"


def stored_as(dtype: str) -> str:
    """What to say about a weight of a dtype that is not read."""
    if dtype == "F64":
        return "is stored as F64: only F32, BF16, F16 can be read; save it by model.to(torch.float32)"
    return f"is stored as {dtype}: only F32, BF16, F16 can be read; {QUANTIZED}"


def misshapen(shape: tuple[int, ...], asked: tuple[int, ...], said_by: str) -> str:
    """What to say about a weight of another shape than the config asks for."""
    has = f"has shape {shape}, {said_by} asks for {asked}"
    if 0 in shape:
        return (
            f"{has}: it is empty, as DeepSpeed's ZeRO 3 saves a model that was not gathered: run zero_to_fp32.py there"
        )
    if len(shape) == 1 < len(asked):
        return f"{has}: it is flat, as FSDP shards it, or packed: save the whole model (FULL_STATE_DICT), not a shard"
    return f"{has}: the two are not from one checkpoint"

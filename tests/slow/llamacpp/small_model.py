"""Write a multimodal model of random weights, of one megabyte, for llama.cpp's server.

A llama of two layers whose tokens are bytes, and a projector like Pixtral's. It writes random printable ASCII
and never ends by itself: only a grammar or the token limit ends its answers.
"""

from pathlib import Path

import gguf
import numpy as np

CONTEXT_TOKENS = 2048
WIDTH = 64
INNER_WIDTH = 128
HEADS = 4
LAYERS = 2
PATCH_PIXELS = 16
# Patches of a side that become one token.
MERGE = 2
FIRST_BYTE = 3
PRINTABLE = range(0x20, 0x7F)
TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
]
TYPES = [
    *(gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL),
    *[gguf.TokenType.BYTE] * 256,
    *[gguf.TokenType.CONTROL] * 3,
]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def write_model(path: Path) -> None:
    """Write the language model."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER_WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types(TYPES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    # The first dimension is the same for all tokens, so its output weights are a bias: for printable bytes.
    embeddings, output = _weights(random, len(TOKENS), WIDTH), _weights(random, len(TOKENS), WIDTH)
    embeddings[:, 0] = 1.0
    output[:, 0] = [0.0 if token - FIRST_BYTE in PRINTABLE else -10.0 for token in range(len(TOKENS))]
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        _add_layer(writer, random, f"blk.{layer}", "attn_output", ("attn_norm", "ffn_norm"))
    _write(writer)


def write_projector(path: Path) -> None:
    """Write the part that turns images into tokens."""
    random = np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(value=True)
    writer.add_clip_projector_type("pixtral")
    writer.add_vision_image_size(1024)
    writer.add_vision_patch_size(PATCH_PIXELS)
    writer.add_vision_spatial_merge_size(MERGE)
    writer.add_vision_embedding_length(WIDTH)
    writer.add_vision_feed_forward_length(INNER_WIDTH)
    writer.add_vision_projection_dim(WIDTH)
    writer.add_vision_block_count(1)
    writer.add_vision_head_count(HEADS)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_vision_use_silu(value=True)
    writer.add_tensor("v.patch_embd.weight", _weights(random, WIDTH, 3, PATCH_PIXELS, PATCH_PIXELS))
    writer.add_tensor("v.pre_ln.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("v.token_embd.img_break", _weights(random, WIDTH))
    _add_layer(writer, random, "v.blk.0", "attn_out", ("ln1", "ln2"))
    writer.add_tensor("mm.input_norm.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("mm.patch_merger.weight", _weights(random, WIDTH, MERGE * MERGE * WIDTH))
    writer.add_tensor("mm.1.weight", _weights(random, WIDTH, WIDTH))
    writer.add_tensor("mm.2.weight", _weights(random, WIDTH, WIDTH))
    _write(writer)


def _weights(random: np.random.Generator, *shape: int) -> "np.typing.NDArray[np.float32]":
    return random.normal(0, 0.05, shape).astype(np.float32)


def _add_layer(
    writer: gguf.GGUFWriter, random: np.random.Generator, layer: str, output: str, norms: tuple[str, str]
) -> None:
    for name in ("attn_q", "attn_k", "attn_v", output):
        writer.add_tensor(f"{layer}.{name}.weight", _weights(random, WIDTH, WIDTH))
    for name in norms:
        writer.add_tensor(f"{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    for name in ("ffn_gate", "ffn_up"):
        writer.add_tensor(f"{layer}.{name}.weight", _weights(random, INNER_WIDTH, WIDTH))
    writer.add_tensor(f"{layer}.ffn_down.weight", _weights(random, WIDTH, INNER_WIDTH))


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

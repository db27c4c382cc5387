"""Writes a saved Llama of transformers as the GGUF file that llama.cpp reads."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def convert(folder: Path, path: Path) -> None:
    """Write ``folder`` with its ``config.json`` and ``model.safetensors`` in bfloat16 to ``path``."""
    gguf: Any = import_module("gguf")
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    turned = {"attn_q": heads, "attn_k": key_heads}
    for name, bits in _tensors(folder / "model.safetensors"):
        there = _name(name)
        kind = there.split(".")[-2]
        values = _interleaved(bits, turned[kind]) if kind in turned else bits
        if values.ndim == 1:  # norms are float32 there
            values = (values.astype("uint32") << 16).view("float32")
            writer.add_tensor(there, values)
        else:
            raw = values.view("uint8")
            writer.add_tensor(there, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and bits, as uint16, of a safetensors file of bfloat16."""
    numpy: Any = import_module("numpy")
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    head: Mapping[str, Any] = json.loads(data[8 : 8 + size])
    for name, entry in head.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}; only bfloat16 is written")
        begin, end = entry["data_offsets"]
        found = numpy.frombuffer(data[8 + size + begin : 8 + size + end], "uint16")
        yield name, found.reshape(entry["shape"]).copy()


def _name(name: str) -> str:
    plain = name.removesuffix(".weight")
    if plain in _OUTER:
        return f"{_OUTER[plain]}.weight"
    number, _, part = plain.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_LAYER[part]}.weight"


def _interleaved(bits: Any, heads: int) -> Any:
    """Rows in the order of rotary pairs that llama.cpp expects: halves become neighbours."""
    rows, columns = bits.shape
    halves = bits.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns).copy()

"""Export the embedded model for other servers: ``python -m ec_agents.embedded.export OUT``.

``OUT.gguf`` is a file for llama.cpp (extra ``export``); any other name is a folder in the Hugging Face
format, for vLLM and transformers. Both hold the same float32 weights, tokens and chat template, so that these servers
compute the same log-probabilities as the numpy network.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ec_agents.embedded import vocabulary as v
from ec_agents.embedded.transformer import CONTEXT, Floats, Shape

TEMPLATE = """\
{%- if tools %}<|tools|>
{%- for tool in tools %}{{ '' if loop.first else ' ' }}{{ tool.function.name }}{% endfor %}
{%- endif %}
{%- for message in messages if message.role in ['user', 'assistant', 'tool'] %}
{{- '<|' + message.role + '|>' }}
{%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content if message.role != 'assistant' else (message.content or '').split('</think>') | last }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}
{{- '}</tool_call>' }}
{%- endfor %}
{%- if message.role == 'assistant' %}<|end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
"""``template.render`` in Jinja.

A thought in the text of an earlier answer is dropped, because the network was trained without it; a thought in its own
field is kept, which shows llama.cpp how thoughts are marked.
"""
ROLES = range(v.END, v.TOOLS + 1)
"""Tokens that begin or end a message; servers neither show them nor parse them in the text of a message."""


def export(out: Path) -> None:
    """Export the model that ships with the package.

    Args:
        out: A file if the name ends in ``.gguf``, otherwise a folder; existing files of the same names are overwritten.

    Raises:
        ImportError: ``out`` is a file and the extra ``export`` is not installed.
    """
    shape = Shape(vocabulary=v.SIZE)
    with (
        as_file(files("ec_agents.embedded") / "weights.npz") as path,
        np.load(path, allow_pickle=False) as arrays,
    ):
        tensors = dict(_tensors({name: np.asarray(arrays[name], np.float32) for name in arrays}, shape))
    (_write_gguf if out.suffix == ".gguf" else _write_folder)(out, tensors, shape)


def _tensors(weights: Mapping[str, Floats], shape: Shape) -> Iterator[tuple[str, Floats]]:
    """The weights by the names of a ``LlamaForCausalLM``, ``(out, in)``; the output matrix is the embedding."""
    yield "model.embed_tokens.weight", weights["embed"]
    yield "model.norm.weight", weights["norm"]
    for i in range(shape.layers):
        layer, ours = f"model.layers.{i}.", f"layers.{i}."
        yield layer + "input_layernorm.weight", weights[ours + "attn_norm"]
        for name, part in zip("qkv", np.split(weights[ours + "qkv"], 3), strict=True):
            yield layer + f"self_attn.{name}_proj.weight", part
        yield layer + "self_attn.o_proj.weight", weights[ours + "out"]
        yield layer + "post_attention_layernorm.weight", weights[ours + "mlp_norm"]
        for name, part in zip(("gate", "up"), np.split(weights[ours + "gate_up"], 2), strict=True):
            yield layer + f"mlp.{name}_proj.weight", part
        yield layer + "mlp.down_proj.weight", weights[ours + "down"]


def _spelled() -> list[str]:
    """Each token as byte-level BPE writes it: bytes as the letters that GPT-2 gave them, whole words as they are."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)] + [v.decode([i]) for i in range(256, v.SIZE)]


def _write_gguf(out: Path, tensors: Mapping[str, Floats], shape: Shape) -> None:
    try:
        import gguf  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ImportError("a GGUF file needs the package gguf: pip install 'ec-agents[export]'") from error
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("ec-agents-embedded")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(_spelled())
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.NORMAL if i < 256 else kinds.CONTROL if i in ROLES else kinds.USER_DEFINED for i in range(v.SIZE)]
    )
    # llama.cpp needs at least one merge; this one never applies, because text is merged one letter at a time.
    writer.add_token_merges(["<|end|> <|end|>"])
    writer.add_eos_token_id(v.END)
    writer.add_add_bos_token(value=False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    for name, tensor in tensors.items():
        turned = _interleaved(tensor, shape.heads) if "q_proj" in name or "k_proj" in name else tensor
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", turned)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(matrix: Floats, heads: int) -> Floats:
    """Rows of each head in the order of llama.cpp, where neighbours turn together instead of the two halves."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def _write_folder(out: Path, tensors: Mapping[str, Floats], shape: Shape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": v.END,
        "dtype": "float32",
    }
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", config), ("tokenizer_config", tokenizer), ("tokenizer", _tokenizer())):
        (out / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    (out / "model.safetensors").write_bytes(_safetensors(tensors))


def _tokenizer() -> dict[str, Any]:
    """The vocabulary as a ``tokenizer.json``: byte-level BPE without merges, whole words as added tokens."""
    spelled = _spelled()
    added = [
        {
            "id": i,
            "content": spelled[i],
            "special": i in ROLES,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for i in range(256, v.SIZE)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": {text: i for i, text in enumerate(spelled)}, "merges": list[str]()}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }


def _safetensors(tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The arrays as a safetensors file: length of the header, header, numbers."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    numbers = (np.ascontiguousarray(tensor, "<f4").tobytes() for tensor in tensors.values())
    return len(head).to_bytes(8, "little") + head + b"".join(numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the embedded model for other servers.")
    parser.add_argument("out", type=Path, help="OUT.gguf for llama.cpp, or a folder for vLLM and transformers")
    export(parser.parse_args().out)

"""The files that other servers read hold the weights, the tokens and the template of the embedded model.

That servers read them so is shown in ``test_real_server.py``.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from ec_agents.embedded import vocabulary as v
from ec_agents.embedded.export import TEMPLATE, export
from ec_agents.embedded.template import Turn, render

Arrays = Mapping[str, NDArray[np.float32]]
HEADS, LAYERS = 4, 5


@pytest.fixture(scope="module")
def weights() -> Arrays:
    with as_file(files("ec_agents.embedded") / "weights.npz") as path, np.load(path) as arrays:
        return {name: arrays[name].astype(np.float32) for name in arrays}


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def llama(weights: Arrays) -> dict[str, NDArray[np.float32]]:
    """The weights as ``LlamaForCausalLM`` names them."""
    found = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    for i in range(LAYERS):
        ours = {name: weights[f"layers.{i}.{name}"] for name in ("qkv", "out", "gate_up", "down")}
        layer = {
            "input_layernorm": weights[f"layers.{i}.attn_norm"],
            "post_attention_layernorm": weights[f"layers.{i}.mlp_norm"],
            "self_attn.q_proj": ours["qkv"][:128],
            "self_attn.k_proj": ours["qkv"][128:256],
            "self_attn.v_proj": ours["qkv"][256:],
            "self_attn.o_proj": ours["out"],
            "mlp.gate_proj": ours["gate_up"][:352],
            "mlp.up_proj": ours["gate_up"][352:],
            "mlp.down_proj": ours["down"],
        }
        found |= {f"model.layers.{i}.{name}.weight": array for name, array in layer.items()}
    return found


def test_a_folder_for_vllm_and_transformers(weights: Arrays, tmp_path: Path):
    export(tmp_path / "model")
    body = (tmp_path / "model" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(body[:8], "little")
    header: dict[str, Any] = json.loads(body[8:start])
    found = {
        name: np.frombuffer(body[start:][slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in header.items()
    }
    assert_equal(found, llama(weights))
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    assert sorted(tokenizer["model"]["vocab"].values()) == list(range(v.SIZE))
    assert [token["content"] for token in tokenizer["added_tokens"]] == [*v.CONTROL, *v.PHRASES]


def test_a_file_for_llama_cpp(weights: Arrays, tmp_path: Path):
    export(tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    expected = {f"{names[name[:-7]]}.weight": array for name, array in llama(weights).items()}
    for name in expected:
        if "attn_q" in name or "attn_k" in name:
            # Pair i of a head is rows 2i and 2i + 1 here, and i and i + 16 of the head there.
            rows = [32 * head + 16 * half + i for head in range(HEADS) for i in range(16) for half in (0, 1)]
            expected[name] = expected[name][rows]
    assert_equal({tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}, expected)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == v.SIZE
    assert tokens[256:] == [*v.CONTROL, *v.PHRASES]
    assert tokens[ord("a")] == "a"
    assert tokens[ord(" ")] == "Ġ"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
calls = st.lists(st.tuples(st.sampled_from(["calc", "add"]), st.dictionaries(texts, texts, max_size=2)), max_size=2)


def template() -> jinja2.Template:
    """The template as transformers reads it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 - no HTML
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE)


@given(st.lists(st.tuples(texts, calls, texts), min_size=1, max_size=3), st.lists(st.sampled_from(["calc", "add"])))
def test_the_template_says_what_ours_says(steps: Sequence[Any], tools: Sequence[str]):
    messages: list[dict[str, Any]] = [{"role": "system", "content": "be good"}]
    turns: list[Turn] = []
    for question, made, thought in steps:
        functions = [{"function": {"name": name, "arguments": arguments}} for name, arguments in made]
        messages += [{"role": role, "content": question + "</think>"} for role in ("user", "tool")]
        said = f"<think>{thought}</think>ok" if thought else None
        messages.append({"role": "assistant", "content": said, "tool_calls": functions})
        turns += [
            Turn("user", question + "</think>"),
            Turn("tool", question + "</think>"),
            Turn("assistant", "ok" if thought else "", made),
        ]
    given_tools = [{"function": {"name": name}} for name in tools]
    said = template().render(messages=messages, tools=given_tools, add_generation_prompt=True)
    assert said == v.decode(render(turns, tools))


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'ec-agents\[export\]'"):
        export(tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())

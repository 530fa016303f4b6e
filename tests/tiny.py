"""A Llama and a byte-level tokenizer small enough to build in every test, and a really trained model of 1 MB."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast tokenizer with one token a byte, three special tokens and a ChatML template (pad = eos)."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """Return a Llama (hidden 32, 4 heads, 2 key-value heads, tied embeddings) whose weights depend on `seed` alone.

    The global random stream is left as it was. Every dtype holds the same float32 draws, rounded.
    """
    config = LlamaConfig(
        vocab_size=272,  # 259 tokens, and some rows without a token, as real models have
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # 1 / sqrt(32): activations keep their size, so attention and MLP matter
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def tiny_model_folder(path: Path, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2) -> Path:
    """Save `tiny_model` (safetensors) and `tiny_tokenizer` in folder `path`, and return `path`."""
    tiny_model(dtype, seed, layers).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def stories_model(data: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the 260 K parameter model of TinyStories, in float32, and its tokenizer of 512 pieces.

    Args:
        data: the folder that holds `tiny_lm/stories260K.bin` and `tiny_lm/tok512.bin` (llama2.c formats).
    """
    raw = (data / "tiny_lm" / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", raw[:28])
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    model.load_state_dict(_stories_weights(torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), config))
    return model.eval(), _stories_tokenizer((data / "tiny_lm" / "tok512.bin").read_bytes())


def _stories_weights(flat: Tensor, config: LlamaConfig) -> dict[str, Tensor]:
    dim, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = dim // config.num_attention_heads * config.num_key_value_heads
    per_layer = {  # in the order of the file; each is stored for all layers before the next begins
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    position = 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        start, position = position, position + int(torch.Size(shape).numel())
        return flat[start:position].view(shape)

    state = {"model.embed_tokens.weight": take(config.vocab_size, dim)}
    for name, shape in per_layer.items():
        for i, weight in enumerate(take(layers, *shape)):
            # The file rotates adjacent pairs, transformers rotates the first half against the second.
            rotated = name in {"self_attn.q_proj", "self_attn.k_proj"}
            head = dim // config.num_attention_heads
            halves = weight.view(-1, head // 2, 2, dim).transpose(1, 2).reshape(shape) if rotated else weight
            state[f"model.layers.{i}.{name}.weight"] = halves
    state["model.norm.weight"] = take(dim)
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"]}


def _stories_tokenizer(raw: bytes) -> PreTrainedTokenizerFast:
    pieces: list[tuple[str, float]] = []
    position = 4
    while position < len(raw):
        score, size = struct.unpack_from("<fi", raw, position)
        pieces.append((raw[position + 8 : position + 8 + size].decode(), score))
        position += 8 + size
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(p for p, _ in pieces[259:])]
    vocab = {name: i for i, name in enumerate(names)}
    pairs = [(score, a, b) for piece, score in pieces[259:] for a, b in _cuts(piece) if a in vocab and b in vocab]
    merges = [(a, b) for _, a, b in sorted(pairs, key=lambda pair: -pair[0])]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(Regex("^(?=.)"), " ")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _cuts(piece: str) -> list[tuple[str, str]]:
    return [(piece[:i], piece[i:]) for i in range(1, len(piece))]

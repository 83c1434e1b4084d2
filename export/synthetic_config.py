"""The files beside a synthetic checkpoint's weights: configuration, preprocessing, and a small tokenizer for the toy.

Fields and their order follow Qwen2.5-VL-3B-Instruct as published, and what transformers 5 saves of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sidecar.vision.spec import PixelSpec

Kind = Literal["toy", "3b", "7b"]
DType = Literal["bfloat16", "float16", "float32"]

# What Qwen2.5's tokenizer adds after its vocabulary, in the order of the ids. The first 14 are special tokens.
_ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
    *(
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|fim_pad|>",
        "<|repo_name|>",
    ),
    "<|file_sep|>",
)
_SPECIAL_TOKENS = 14
_TOY_VOCABULARY = 512
_FIRST_ADDED = {"toy": _TOY_VOCABULARY - len(_ADDED_TOKENS), "3b": 151643, "7b": 151643}

_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# The MLP's width is a multiple of no vector register's, as 3420 is.
_TOY_VISION = {"depth": 4, "hidden_size": 64, "intermediate_size": 100, "num_heads": 4, "fullatt_block_indexes": [1, 3]}

_TEXT: dict[str, dict[str, Any]] = {
    "toy": {
        "hidden_size": 128,  # heads of 32, the narrowest that vLLM's CPU attention takes
        "intermediate_size": 256,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "vocab_size": _TOY_VOCABULARY,
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}
# Fields of the flat config.json that belong to the model as a whole; transformers 5 nests the others.
_OUTER_FIELDS = ("architectures", "model_type", "random_weights", "tie_word_embeddings", "transformers_version")

# One role per turn, and a pair of markers around each picture's placeholder, which the processor repeats per token.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] in ('image', 'image_url') or 'image' in content -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif content['type'] in ('video', 'video_url') or 'video' in content -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in content -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

# Any text will do: it only decides which byte pairs become tokens.
_TOKENIZER_TEXT = """\
You are a helpful assistant. Describe this picture in detail. What is in the image, and what is the person doing? The
picture shows a street with houses, trees and a bicycle leaning against a wall; the sky is blue with a few white clouds.
How many people are there? There are three people: two of them are talking, the third one is reading a newspaper. Which
colour is the car on the left side? Read the text on the sign and translate it. Compare both pictures, first the one
above, then the other below. The video shows a cat that jumps on a table, looks around and sleeps. Answer with yes or
no, and give the reason.
"""
_PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def model_config(kind: Kind, dtype: DType) -> dict[str, Any]:
    """`config.json` in the published layout: the language model's fields on the top level."""
    token_id = {token: _FIRST_ADDED[kind] + index for index, token in enumerate(_ADDED_TOKENS)}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": token_id["<|endoftext|>"],
        "eos_token_id": token_id["<|im_end|>"],
        "vision_start_token_id": token_id["<|vision_start|>"],
        "vision_end_token_id": token_id["<|vision_end|>"],
        "vision_token_id": token_id["<|vision_pad|>"],
        "image_token_id": token_id["<|image_pad|>"],
        "video_token_id": token_id["<|video_pad|>"],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "qwen2_5_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "random_weights": True,  # in no published file: it keeps random embeddings from passing for real ones
        "torch_dtype": dtype,
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        **_TEXT[kind],
        "vision_config": {
            **(_TOY_VISION if kind == "toy" else _VISION),
            "hidden_act": "silu",
            "in_chans": 3,
            "out_hidden_size": _TEXT[kind]["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def write_configs(directory: Path, config: Mapping[str, Any], *, nested: bool) -> None:
    """Write config.json and the processors' files, as published or, `nested`, as transformers 5 saves them."""
    spec = PixelSpec()
    statistics = {"image_mean": list(spec.image_mean), "image_std": list(spec.image_std)}
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    least, most = 3136, 12845056
    if not nested:
        published = {"min_pixels": least, "max_pixels": most, **patches, **statistics}
        published |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
        write_json(directory / "preprocessor_config.json", published)
        write_json(directory / "config.json", config)
        return
    processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        **statistics,
        **patches,
    }
    processor |= {"resample": 3, "rescale_factor": 1 / 255, "size": {"longest_edge": most, "shortest_edge": least}}
    processors = {
        "image_processor": {**processor, "image_processor_type": "Qwen2VLImageProcessor"},
        "processor_class": "Qwen2_5_VLProcessor",
        "video_processor": {**processor, "video_processor_type": "Qwen2VLVideoProcessor"},
    }
    write_json(directory / "processor_config.json", processors)
    write_json(directory / "config.json", _nested(config))


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    outer = {name: config[name] for name in config if name in _OUTER_FIELDS or name.endswith("_token_id")}
    text = {name: value for name, value in config.items() if name not in outer and name != "vision_config"}
    rope = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    dtype = text.pop("torch_dtype")
    ends = {name: outer.pop(name) for name in ("bos_token_id", "eos_token_id")}
    vision = {
        name: value for name, value in config["vision_config"].items() if name not in ("in_chans", "spatial_patch_size")
    }
    return {
        **outer,
        "dtype": dtype,
        "text_config": {**text, **ends, "dtype": dtype, "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
        "transformers_version": "5.19.0",
        "vision_config": {
            **vision,
            "in_channels": 3,
            "model_type": "qwen2_5_vl_vision",
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
        },
    }


def write_tokenizer(directory: Path) -> None:
    """Write the toy's byte-level BPE tokenizer with Qwen's special tokens, its chat template, and greedy generation."""
    # Here, because no other checkpoint needs the library.
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    first = _FIRST_ADDED["toy"]
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRETOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=first, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TOKENIZER_TEXT], trainer)
    for index, token in enumerate(_ADDED_TOKENS):
        added = AddedToken(token, special=index < _SPECIAL_TOKENS, normalized=False)
        (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    tokenizer.save(str(directory / "tokenizer.json"))

    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(first + index): {"content": token, **plain, "special": index < _SPECIAL_TOKENS}
        for index, token in enumerate(_ADDED_TOKENS)
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(_ADDED_TOKENS[1:_SPECIAL_TOKENS]),
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    write_json(directory / "chat_template.json", {"chat_template": _CHAT_TEMPLATE})
    # Greedy, so that two runs can be compared; eos is <|im_end|> or <|endoftext|>.
    generation = {"bos_token_id": first, "do_sample": False, "eos_token_id": [first + 2, first], "pad_token_id": first}
    write_json(directory / "generation_config.json", generation)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented, as Hugging Face files are."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

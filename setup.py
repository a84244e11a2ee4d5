"""Installs `model`, `data`, `trainer` and `tools`. Versions are pinned in constraints.txt, in no other place."""

from setuptools import find_packages, setup

EXTRAS = {
    "media": ["av"],
    "quantize": ["bitsandbytes"],
    "track": ["tensorboard", "wandb"],
    "plot": ["matplotlib"],
    "demo": ["scikit-learn"],
    "parquet": ["pyarrow"],
    "sentencepiece": ["sentencepiece"],
}
USED_BY_TESTS = ("media", "plot", "demo", "sentencepiece", "parquet", "quantize")
TEST = ["pytest", "hypothesis", "ruff", "mypy", "peft", "accelerate"]

setup(
    name="multimodal-trainer",
    version="0.1.0",
    description="A trainer for vision-language models by hand on raw PyTorch",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["model*", "data*", "trainer*", "tools*"]),
    package_data={"tools.demos": ["*.toml"], "tools.inspector": ["*.css", "*.js"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "safetensors",
        "pillow>=12.3",
        "numpy>=2",
        "tqdm",
        "Jinja2>=3.1.6",  # renders chat templates, which come with models from anywhere
    ],
    extras_require={**EXTRAS, "test": TEST + [package for name in USED_BY_TESTS for package in EXTRAS[name]]},
)

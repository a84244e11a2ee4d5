"""Installs `model`, `data`, `trainer` and `tools`. Versions are pinned in constraints.txt, in no other place."""

from setuptools import find_packages, setup

EXTRAS = {
    "media": ["av"],
    "quantize": ["bitsandbytes"],
    "track": ["tensorboard", "wandb"],
    "plot": ["matplotlib"],
    "metrics": ["jiwer", "rapidfuzz", "sacrebleu"],
    "demo": ["scikit-learn"],
    "parquet": ["pyarrow"],
    "sentencepiece": ["sentencepiece"],
}
USED_BY_TESTS = ("media", "plot", "demo", "sentencepiece", "parquet", "quantize", "metrics", "track")
COMMANDS = {
    "train": "trainer.main:command",
    "plan": "tools.plan:main",
    "check": "tools.check_data:main",
    "inspect": "tools.inspect_data:main",
    "chat": "tools.chat:main",
    "evaluate": "tools.evaluate:main",
    "import": "tools.import_model:main",
    "export": "tools.export_adapter:main",
    "probe": "tools.probe:main",
    "replay": "tools.replay:main",
    "merge": "tools.merge_lora:main",
    "plot": "tools.plot_run:main",
    "watch": "tools.watch:main",
    "templates": "tools.check_templates:main",
    "demo": "tools.demo:main",
    "demo-omni": "tools.demo_omni:main",
}
"""Commands by name, installed as `mmt-NAME`: unlike `python -m`, they never look for packages in the current folder."""
PAGE_FILES = ["*.html", "*.css", "*.js"]
DATA_FILES = {
    "data.media": ["*.toml"],
    "data.text": ["*.jinja", "formats/*.jinja"],
    "tools": ["py.typed", "*.toml"],
    "tools.benches": ["*.jinja", "*.toml"],
    "tools.devicechecks": ["*.toml"],
    "tools.exports": ["*.toml", "*.jinja"],
    "tools.demos": ["*.toml", "*.jinja"],
    **{f"tools.{name}": PAGE_FILES for name in ("asking", "chatting", "evaluation", "inspector", "watcher")},
    "trainer.recipes": ["*.toml", "*.sh"],
}
PACKAGES = ["model", "data", "trainer", "tools"]
TEST = ["pytest", "hypothesis", "ruff", "mypy", "peft", "accelerate"]

setup(
    name="multimodal-trainer",
    version="0.1.0",
    description="A trainer for vision-language models by hand on raw PyTorch",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Run files to copy stand at the top of the source tree, and inside `trainer` once installed: `--cfg recipe:NAME` finds both.
    packages=[*find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]), "trainer.recipes"],
    package_dir={"trainer.recipes": "recipes"},
    package_data={**{name: ["py.typed"] for name in PACKAGES}, **DATA_FILES},
    entry_points={"console_scripts": [f"mmt-{name} = {function}" for name, function in COMMANDS.items()]},
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

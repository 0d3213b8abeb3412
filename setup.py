import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "das_ds/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION is not None, "das_ds/__init__.py must set __version__"

setup(
    name="das_ds",
    version=VERSION[1],
    description="Continual domain-adaptive pre-training with soft masking inside DeepSpeed ZeRO",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["das_ds", "das_ds.*"]),
    package_data={"das_ds.kernels.native": ["*.cpp"], "das_ds.reporting": ["*.jinja"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
        "deepspeed>=0.19",
        "transformers>=5.0",
        "datasets>=5.0",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "matplotlib>=3.9",
        "Jinja2>=3.1",
        "tqdm>=4.66",
        "huggingface_hub>=1.31",
        "xxhash>=3.0",
        "pyarrow>=24.0",
        "psutil>=6.0",
        "packaging>=24.0",
    ],
    extras_require={
        "triton": ["triton>=3.6"],
        # 0.8.1 and older give wrong gradients of per-token losses, see das_ds/kernels/dispatch.py.
        "liger": ["triton>=3.6", "liger-kernel>=0.8.2"],
        "wandb": ["wandb>=0.20"],
        "tensorboard": ["tensorboard>=2.18"],
        "mlflow": ["mlflow>=3.0"],
        "trackio": ["trackio>=0.40"],
        "lora": ["peft>=0.19"],
        "dev": [
            "triton>=3.6",
            "liger-kernel>=0.8.2",
            "peft>=0.19",
            "tensorboard>=2.18",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "scipy>=1.14",
            "ruff>=0.15",
            "mypy>=2.0",
            "types-PyYAML>=6.0",
        ],
    },
    entry_points={"console_scripts": ["das-ds = das_ds.cli:main"]},
)

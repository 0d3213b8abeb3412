import re
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.build import build

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "das_ds/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION is not None, "das_ds/__init__.py must set __version__"
SHIPPED = ("ds_configs/*.json", "launch/slurm/*.sh", "launch/slurm/*.sbatch")
"""Files at the root of the repository that the package reads (das_ds/shipped_files.py)."""


class BuildShipped(Command):
    """Copies the files of `SHIPPED` to `das_ds/shipped/` of what is built, and lists them for an sdist."""

    description = "copy files of the repository's root into the package"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    # Set by setuptools for `pip install -e`: the package then stays where it is, next to the originals.
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        if not self.editable_mode:
            for built, source in self.get_output_mapping().items():
                self.mkpath(str(Path(built).parent))
                self.copy_file(source, built)

    def get_source_files(self) -> list[str]:
        """Their paths, relative to the root of the repository."""
        return [str(path.relative_to(HERE)) for pattern in SHIPPED for path in sorted(HERE.glob(pattern))]

    def get_output_mapping(self) -> dict[str, str]:
        """What is built -> from which file."""
        assert self.build_lib is not None
        return {str(Path(self.build_lib, "das_ds/shipped", source)): source for source in self.get_source_files()}

    def get_outputs(self) -> list[str]:
        """What is built."""
        return list(self.get_output_mapping())


build.sub_commands.append(("build_shipped", None))


def readme() -> str:
    """README.md; links to other files of the repository, which a package index has not, become plain text."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"!?\[([^\]]+)\]\((?!https?://)[^)\s]+\)", r"\1", text)


FEATURES = {
    "triton": ["triton>=3.6"],
    # 0.8.1 and older give wrong gradients of per-token losses, see das_ds/kernels/dispatch.py.
    "liger": ["triton>=3.6", "liger-kernel>=0.8.2"],
    "wandb": ["wandb>=0.20"],
    "tensorboard": ["tensorboard>=2.18", "pillow>=11.0"],
    "mlflow": ["mlflow>=3.0"],
    "trackio": ["trackio>=0.40"],
    "lora": ["peft>=0.19"],
}

setup(
    name="das_ds",
    version=VERSION[1],
    description="Continual domain-adaptive pre-training with soft masking inside DeepSpeed ZeRO",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["continual learning", "domain adaptation", "language model", "pre-training", "DeepSpeed", "ZeRO"],
    project_urls={"Paper": "https://arxiv.org/abs/2302.03241"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["das_ds", "das_ds.*"]),
    package_data={"das_ds": ["py.typed"], "das_ds.kernels.native": ["*.cpp"], "das_ds.reporting": ["*.jinja"]},
    cmdclass={"build_shipped": BuildShipped},
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
        "deepspeed>=0.19",
        "transformers>=5.0",
        "datasets>=5.0",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "pydantic>=2.10",
        "pydantic_core>=2.27",
        "PyYAML>=6.0",
        "matplotlib>=3.9",
        "Jinja2>=3.1",
        "MarkupSafe>=3.0",
        "tqdm>=4.66",
        "huggingface_hub>=1.31",
        "xxhash>=3.0",
        "pyarrow>=24.0",
        "psutil>=6.0",
        "packaging>=24.0",
    ],
    extras_require={
        **FEATURES,
        "all": sorted({requirement for requirements in FEATURES.values() for requirement in requirements}),
        "dev": [
            *FEATURES["liger"],
            *FEATURES["tensorboard"],
            *FEATURES["lora"],
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

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["jsonargparse[signatures]>=4.30", "tensorboard", "matplotlib"]
BERT = ["transformers"]

setup(
    name="esl_fast",
    version="0.1.0",
    description="Enhanced Semantic Similarity Learning (ESL): fused kernels, training, evaluation",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["esl_fast", "esl_fast.*"]),
    package_data={"esl_fast.model": ["configs/*.json"], "esl_fast.training": ["recipes/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "open_clip_torch>=2.30",
        "numpy",
        "pillow",
        "safetensors",
        "tqdm",
        "pyyaml",
    ],
    extras_require={
        "train": TRAIN,
        "bert": BERT,
        "test": ["pytest>=8", "pytest-benchmark", "pytest-xdist", "ruff", *TRAIN, *BERT],
    },
)

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
TRAIN = ["jsonargparse[signatures]>=4.30", "tensorboard", "matplotlib"]
BERT = ["transformers"]

setup(
    name="esl_fast",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "esl_fast/__init__.py").read_text())[1],
    description="Enhanced Semantic Similarity Learning (ESL): fused kernels, training, evaluation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    python_requires=">=3.11",
    packages=find_packages(include=["esl_fast", "esl_fast.*"]),
    package_data={
        "esl_fast": ["py.typed"],
        "esl_fast.model": ["configs/*.json"],
        "esl_fast.training": ["recipes/*.yaml"],
    },
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
    entry_points={
        "console_scripts": [
            "esl-train = esl_fast.training.main:main",
            "esl-evaluate = esl_fast.evaluation.main:main",
        ]
    },
    extras_require={
        "train": TRAIN,
        "bert": BERT,
        "test": ["pytest>=8", "pytest-benchmark", "pytest-xdist", "ruff", *TRAIN, *BERT],
    },
)
